"""The frozen random bases A and B that every adapted layer slices.

RandLoRA (arXiv 2502.00987) shares one pair of random bases between all layers; a layer reads only
their leading corner. So the pair is drawn such that an element never depends on the extents it is
drawn with: wider layers *extend* the bases instead of changing them, adapters of different widths
share one pair, and any part can be drawn where it is needed.

Nothing here depends on the backend, the number of devices, the sharding, ``jax_enable_x64`` or the
version of ``jax.random.uniform``: raw 32-bit threefry words are turned into numbers by arithmetic
that is exact but for one rounding.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

Kind = Literal["dense", "sparse", "very_sparse"]


class BasisPair(NamedTuple):
    """One pair of shared bases, as layers use it.

    A: (r, MIN), B: (MAX, N, r); bfloat16 wherever that loses nothing of float32, else in the file's
    float32 or float16. Ternary ones are int8, -1, 0 or 1, and their unit is a part of the adapter's
    scaling.
    """

    A: jax.Array
    B: jax.Array


class Extents(NamedTuple):
    """Extents of a pair: ``MAX`` rows of B, ``N`` bases, ``MIN`` columns of A."""

    max: int
    n: int
    min: int

    def union(self, other: "Extents") -> "Extents":
        """The smallest extents that hold both."""
        return Extents(*map(max, self, other))


@dataclass(frozen=True)
class BasisIdentity:
    """What decides the numbers of a pair, whatever its extents.

    Args:
      source: ``"jax"`` for a pair drawn here; ``"file:<digest>"`` for one that came with a file.
      key: the user's ``projection_prng_key``.
      kind: dense, sparse or very sparse.
      r: rank of each basis.
      sparsity: the s of a ternary pair (each sign has probability 1/(2s)); 0 for a dense one.
    """

    source: str
    key: int
    kind: Kind
    r: int
    sparsity: float = 0.0

    @classmethod
    def drawn(cls, key: int, kind: Kind, r: int, smallest: int) -> "BasisIdentity":
        """Of a pair that `draw` makes, for an adapter whose pair has `smallest` columns of A."""
        sparsity = {"dense": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(smallest)}[kind]
        return cls("jax", key, kind, r, sparsity)

    @property
    def unit(self) -> float:
        """What an integer of a pair drawn here stands for; 1 for dense pairs."""
        return float(ml_dtypes.bfloat16(math.sqrt(self.sparsity))) if self.sparsity else 1.0

    def __str__(self) -> str:
        return f"{self.source}-{self.key}-{self.kind}-r{self.r}" + (
            f"-s{self.sparsity:.6g}" if self.kind == "very_sparse" else ""
        )


def used_extents(shape: tuple[int, int], r: int) -> Extents:
    """The corner of the bases that one (in, out) matrix slices: max, ceil(min / r), min."""
    return Extents(max(shape), math.ceil(min(shape) / r), min(shape))


def prng_key(key: int) -> jax.Array:
    """A threefry key of the low 64 bits of `key`, the same with and without ``jax_enable_x64``."""
    halves = np.array([key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")


def draw(
    identity: BasisIdentity, extents: Extents, sharding: NamedSharding | None = None
) -> BasisPair:
    """Draws a pair of `identity` and `extents`: bfloat16, or int8 if it is ternary.

    On the default device, or right where `sharding` wants it: each device draws what it holds.

    Row k of A comes from ``fold_in(fold_in(key, 0), k)`` and basis b of B from
    ``fold_in(fold_in(key, 1), b)``, so draws of different extents agree wherever they overlap.
    Dense entries are uniform with unit standard deviation; ternary ones are -1, 0 or 1, to be
    divided by the standard deviation of their distribution (`BasisIdentity.unit`), as PEFT's are by
    the sample's.
    """
    if identity.source != "jax":
        raise ValueError(f"bases of {identity} come from a file and cannot be drawn")
    numbers = jax.jit(_draw, static_argnums=(1, 2, 3, 4), out_shardings=sharding)
    return numbers(prng_key(identity.key), identity.kind, identity.r, identity.sparsity, extents)


def _draw(key: jax.Array, kind: Kind, r: int, sparsity: float, extents: Extents) -> BasisPair:
    numbers = _uniform if kind == "dense" else functools.partial(_ternary, s=sparsity)

    def keys(side: int, count: int) -> tuple[jax.Array, jax.Array]:
        each = jax.vmap(jax.random.fold_in, (None, 0))
        of_side = jax.random.fold_in(key, np.uint32(side))
        halves = jax.random.key_data(each(of_side, jnp.arange(count, dtype=jnp.uint32)))
        return halves[:, 0], halves[:, 1]

    def counter(shape: tuple[int, ...], axis: int) -> jax.Array:
        return lax.broadcasted_iota(jnp.uint32, shape, axis)

    high, low = keys(0, r)
    a = _words(high[:, None], low[:, None], counter((r, extents.min), 1))  # (r, MIN)
    high, low = keys(1, extents.n)
    shape = (extents.max, extents.n, r)
    place = counter(shape, 0) * np.uint32(r) + counter(shape, 2)  # within a basis, row by row
    b = _words(high[None, :, None], low[None, :, None], place)  # (MAX, N, r)
    return BasisPair(numbers(a), numbers(b))


def _words(high: jax.Array, low: jax.Array, counters: jax.Array) -> jax.Array:
    """``jax.random.bits`` of keys (high, low) at `counters`, uint32: threefry2x32, partitionable.

    Written out, since ``jax.random`` passes over the whole array in each of its rounds: that took
    five times as long. `tests/core/test_bases.py` compares the two.
    """
    turns = ((13, 15, 26, 6), (17, 29, 16, 24))
    schedule = (high, low, high ^ low ^ np.uint32(0x1BD11BDA))
    x, y = jnp.broadcast_to(high, counters.shape), counters + low
    for i in range(5):
        for turn in turns[i % 2]:
            x = x + y
            y = x ^ (y << np.uint32(turn) | y >> np.uint32(32 - turn))
        x = x + schedule[(i + 1) % 3]
        y = y + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x ^ y


def _uniform(words: jax.Array) -> jax.Array:
    """Uniform in [-sqrt 3, sqrt 3), unit standard deviation, from the upper 24 bits."""
    unit = (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - jnp.float32(1)  # exact
    return (unit * jnp.float32(math.sqrt(3))).astype(jnp.bfloat16)


def _ternary(words: jax.Array, s: float) -> jax.Array:
    """-1 and 1 with probability 1/(2s) each, else 0."""
    edge = round(2**32 / (2 * s))
    high = (words >= jnp.uint32(2**32 - edge)).astype(jnp.int8)
    return high - (words < jnp.uint32(edge)).astype(jnp.int8)
