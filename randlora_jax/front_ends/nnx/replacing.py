"""Something else in the place of what an nnx model holds, wherever and however often it does."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from randlora_jax.front_ends.nnx.held import of_numpy


def with_value(leaf: nnx.Variable[Any], value: jax.Array) -> nnx.Variable[Any]:
    """A Variable like `leaf` with another value."""
    new = leaf.replace(leaf.get_raw_value())
    if of_numpy(leaf):  # they are written into, and may be read-only
        new.set_raw_value(value)
    else:
        new[...] = value
    return new


def replace_held(root: nnx.Module, new: Mapping[int, Any]) -> None:
    """Puts something in place of modules or quantised arrays wherever `root` has them, in one walk.

    Args:
      new: by the ``id`` of the old one, which must live on.
    """
    for module in [module for _, module in nnx.iter_modules(root)]:
        for name, value in list(vars(module).items()):
            swapped = _swapped(value, new)
            if swapped is value:
                continue
            if issubclass(type(module), nnx.List):  # no wrapper around one
                module[int(name)] = swapped  # flax 0.12.2 has no attributes for its items
            else:
                setattr(module, name, swapped)


def _swapped(value: Any, new: Mapping[int, Any]) -> Any:
    """`value` with what it holds replaced, in containers too; itself if nothing changed."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in (list, tuple):
        parts = [_swapped(v, new) for v in value]
        return value if all(map(lambda a, b: a is b, parts, value)) else type(value)(parts)
    if type(value) is dict:
        items = {k: _swapped(v, new) for k, v in value.items()}
        return value if all(items[k] is value[k] for k in value) else items
    if isinstance(value, nnx.Module | nnx.Variable) or jax.tree_util.all_leaves([value]):
        return value
    leaves, tree = jax.tree.flatten(value, lambda x: x is not value)  # what it holds itself
    parts = [_swapped(leaf, new) for leaf in leaves]
    return (
        value if all(map(lambda a, b: a is b, parts, leaves)) else jax.tree.unflatten(tree, parts)
    )
