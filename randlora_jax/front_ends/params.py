"""A params tree as arrays by path, whatever they lie in.

Flax keeps an array together with what names its axes for a mesh in a *box*, a pytree node around
it (``nn.LogicallyPartitioned``, ``nn.Partitioned``, any ``flax.core.meta.AxisMetadata``). Boxes
belong to the user's tree, and stay there.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from randlora_jax.models.names import Path


def is_box(leaf: Any) -> bool:
    """Whether `leaf` is a box around an array."""
    return isinstance(leaf, meta.AxisMetadata)


def unboxed(leaf: Any) -> Any:
    """The array in a box, as it lies there; any other leaf itself."""
    while is_box(leaf):
        # .unbox() would constrain it to the mesh, where one is set
        leaf = leaf.value if hasattr(leaf, "value") else leaf.unbox()
    return leaf


def boxed_as(leaf: Any, array: Any) -> Any:
    """`array` in a box like that of `leaf`, if `leaf` is one."""
    return jax.tree.unflatten(jax.tree.structure(leaf), [array]) if is_box(leaf) else array


def flat(params: Any) -> dict[Path, Any]:
    """The arrays of a tree in their boxes, by path: keys of dicts, indices, names of attributes."""
    if isinstance(params, Mapping):  # in its own order, which JAX does not keep
        inner = {key: flat(value) for key, value in params.items()}
        return {(key, *path): leaf for key, found in inner.items() for path, leaf in found.items()}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {tuple(map(step_of, keys)): leaf for keys, leaf in leaves}


def with_leaves(params: Any, leaves: Mapping[Path, Any]) -> Any:
    """`params` with other arrays at some paths, in the boxes that are there."""

    def found(keys: tuple[Any, ...], held: Any) -> Any:
        path = tuple(map(step_of, keys))
        return boxed_as(held, leaves[path]) if path in leaves else held

    return jax.tree_util.tree_map_with_path(found, params, is_leaf=is_box)


def owner_of(params: Any, path: Path) -> Path:
    """The path of the innermost dict around the array at `path`."""
    owner: Path = ()
    for part in path[:-1]:
        params = params[part]
        if not isinstance(params, Mapping):
            break
        owner = (*owner, part)
    return owner


def place_beside(params: Any, path: Path, most: int) -> Path:
    """The path of the innermost dict around an array that has room for one more name.

    Args:
      most: of how many parts.
    """
    place = owner_of(params, path)[:most]
    while not isinstance(path[len(place)], str):  # JAX sorts the keys of a dict: numbers or names
        place = place[:-1]
    return place


def with_entries(params: Mapping[Any, Any], entries: Mapping[Path, Any]) -> dict[Any, Any]:
    """`params` with more in its dicts, by path."""
    found = dict(params)
    for (*outer, last), entry in entries.items():
        inner = found
        for part in outer:
            inner[part] = dict(inner[part])
            inner = inner[part]
        inner[last] = entry
    return found


def step_of(key: Any) -> Any:
    """One step of a path in a pytree: a dict's key, an attribute's name, an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key
