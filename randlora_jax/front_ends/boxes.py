"""Boxes: flax keeps an array of a params tree together with what names its axes for a mesh.

``nn.LogicallyPartitioned``, ``nn.Partitioned`` and any other ``flax.core.meta.AxisMetadata``: a
pytree node around one array. They belong to the user's tree, and stay there. So do the integers of
a quantised array, which stand for it here.
"""

from typing import Any

import jax
from flax.core import meta


def is_box(leaf: Any) -> bool:
    """Whether `leaf` is a box around an array."""
    return isinstance(leaf, meta.AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array in a box, as it lies there; any other leaf itself."""
    while is_box(leaf):
        # .unbox() would constrain it to the mesh, where one is set
        leaf = leaf.value if hasattr(leaf, "value") else leaf.unbox()
    return leaf.array.qvalue if _is_quantised(leaf) else leaf


def boxed_as(leaf: Any, array: Any) -> Any:
    """`array` in a box like that of `leaf`, if `leaf` is one."""
    if _is_quantised(leaf):
        held = leaf.array.qvalue
        return jax.tree.map(lambda x: array if x is held else x, leaf)
    return jax.tree.unflatten(jax.tree.structure(leaf), [array]) if is_box(leaf) else array


def _is_quantised(leaf: Any) -> bool:
    """Whether `leaf` is an array that qwix quantised: integers with the scales that belong to them.

    Its class has no public home, so it is known by its parts.
    """
    return hasattr(getattr(leaf, "array", None), "qvalue")
