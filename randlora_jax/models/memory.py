"""What a wrapped model takes in memory while it trains, before any activation."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike


class Memory(NamedTuple):
    """Bytes on one device, or on the first one where a mesh holds the arrays; prints as a table.

    Args:
      base: the frozen base model.
      bases: A and B, which all layers share.
      adapters: lambda, gamma and what is trained whole, of all adapters; of stacks, all the room.
      gradients: of what trains.
      adamw: both of AdamW's moments of what trains.
    """

    base: int
    bases: int
    adapters: int
    gradients: int
    adamw: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self)

    def __str__(self) -> str:
        rows = {**self._asdict(), "total": self.total}
        return "\n".join(f"{name:<10}{_shown(nbytes)}" for name, nbytes in rows.items())


def _shown(nbytes: int) -> str:
    """In the largest unit of which there is one, MiB at most."""
    if nbytes < 2**10:
        return f"{nbytes:>12,} bytes"
    unit, size = ("MiB", 2**20) if nbytes >= 2**20 else ("KiB", 2**10)
    return f"{nbytes / size:>12,.1f} {unit}"


def memory(base: Any, pairs: Any, adapters: Any, trained: Any) -> Memory:
    """Of trees of arrays, which may be shapes alone: a sharded one counts with one device's part.

    Args:
      trained: the part of `adapters` that trains.
    """
    moving = _nbytes(trained)
    base, pairs, adapters = map(_distinct, (base, pairs, adapters))
    return Memory(_nbytes(base), _nbytes(pairs), _nbytes(adapters), moving, 2 * moving)


def _distinct(tree: Any) -> list[Any]:
    """Its leaves; once an array that has several names. Shapes alone have no such."""
    leaves = jax.tree.leaves(tree)
    arrays = {id(leaf): leaf for leaf in leaves if isinstance(leaf, jax.Array)}
    return [*arrays.values(), *(leaf for leaf in leaves if id(leaf) not in arrays)]


def _nbytes(tree: Any) -> int:
    leaves: Iterable[Any] = jax.tree.leaves(tree)
    return sum(math.ceil(_numbers(leaf) * _bits(leaf.dtype) / 8) for leaf in leaves)


def _numbers(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape)


def _bits(dtype: DTypeLike) -> int:
    return int(jax.dtypes.itemsize_bits(dtype))
