"""Arrays that are shapes alone (``jax.ShapeDtypeStruct``), as ``jax.eval_shape`` makes them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike

Tree = Any


def is_abstract(x: Any) -> bool:
    """Whether it has no numbers yet."""
    return isinstance(x, jax.ShapeDtypeStruct)


def some_abstract(tree: Tree) -> bool:
    """Whether a leaf of `tree` has no numbers yet."""
    return any(map(is_abstract, jax.tree.leaves(tree)))


def shape_of(x: Any, sharding: Sharding | None, dtype: DTypeLike | None = None) -> Any:
    """`x` without numbers, to lie where `sharding` says."""
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)


def put(tree: Tree, sharding: Sharding | None) -> Tree:
    """`tree` where `sharding` says; what is abstract is to lie there once it is filled."""
    if not some_abstract(tree):
        return jax.device_put(tree, sharding)  # in one go, not leaf by leaf
    return jax.tree.map(
        lambda x: shape_of(x, sharding) if is_abstract(x) else jax.device_put(x, sharding), tree
    )


def moved(move: Callable[[jax.Array], jax.Array], x: Any) -> Any:
    """What `move` makes of `x`; of its shape, where it is abstract."""
    return shape_of(jax.eval_shape(move, x), x.sharding) if is_abstract(x) else move(x)
