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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.config import RandLoraConfig
from randlora_jax.interop.torch_rng import Kind


class Bases(NamedTuple):
    """One pair of shared bases, as layers use it.

    A: (r, MIN), B: (MAX, N, r); bfloat16 wherever that loses nothing, else float32. PEFT keeps a
    middle axis of length one in A; it exists only in files (``randlora_jax.interop``).
    """

    A: jax.Array
    B: jax.Array


class Box(NamedTuple):
    """Extents of a pair: ``MAX`` rows of B, ``N`` bases, ``MIN`` columns of A."""

    max: int
    n: int
    min: int

    def union(self, other: "Box") -> "Box":
        """The smallest extents that hold both."""
        return Box(*map(max, self, other))


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

    def __str__(self) -> str:
        return f"{self.source}-{self.key}-{self.kind}-r{self.r}" + (
            f"-s{self.sparsity:.6g}" if self.kind == "very_sparse" else ""
        )


def used_box(shape: tuple[int, int], r: int) -> Box:
    """The corner of the bases that one (in, out) matrix slices: max, ceil(min / r), min."""
    return Box(max(shape), math.ceil(min(shape) / r), min(shape))


def peft_box(shapes: list[tuple[int, int]], r: int) -> Box:
    """The extents PEFT gives the pair of an adapter with these (in, out) matrices.

    PEFT takes the largest ``in`` and the largest ``out`` over all targets, then their maximum and
    minimum (``RandLoraModel._find_dim``): often far more than any layer slices.
    """
    return used_box((max(s[0] for s in shapes), max(s[1] for s in shapes)), r)


def jax_identity(config: RandLoraConfig, box: Box) -> BasisIdentity:
    """Identity of the pair that `config` asks for, for an adapter whose PEFT box is `box`."""
    kind = config.kind
    sparsity = {"dense": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(box.min)}[kind]
    return BasisIdentity("jax", config.projection_prng_key, kind, config.r, sparsity)


def prng_key(key: int) -> jax.Array:
    """A threefry key of the low 64 bits of `key`, the same with and without ``jax_enable_x64``."""
    halves = np.array([key >> 32 & 0xFFFFFFFF, key & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(halves), impl="threefry2x32")


def draw(identity: BasisIdentity, box: Box) -> Bases:
    """Draws a pair of `identity` with the extents of `box`, in bfloat16, on the default device.

    Row k of A comes from ``fold_in(fold_in(key, 0), k)`` and basis b of B from
    ``fold_in(fold_in(key, 1), b)``, so draws of different extents agree wherever they overlap.
    Dense entries are uniform with unit standard deviation; ternary ones are -1, 0 or 1 divided by
    the standard deviation of their distribution, as PEFT's (there it is the sample's).
    """
    if identity.source != "jax":
        raise ValueError(f"bases of {identity} come from a file and cannot be drawn")
    with jax.threefry_partitionable(True):
        return _draw(prng_key(identity.key), identity.kind, identity.r, identity.sparsity, box)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key: jax.Array, kind: Kind, r: int, sparsity: float, box: Box) -> Bases:
    def words(side: int, count: int, shape: tuple[int, ...]) -> jax.Array:
        def one(i: jax.Array) -> jax.Array:
            return jax.random.bits(jax.random.fold_in(side_key, i), shape, jnp.uint32)

        side_key = jax.random.fold_in(key, np.uint32(side))
        return jax.vmap(one)(jnp.arange(count, dtype=jnp.uint32))

    numbers = _uniform if kind == "dense" else functools.partial(_ternary, s=sparsity)
    a = numbers(words(0, r, (box.min,)))  # (r, MIN)
    b = numbers(words(1, box.n, (box.max, r)))  # (N, MAX, r)
    return Bases(a, b.transpose(1, 0, 2))  # (MAX, N, r)


def _uniform(words: jax.Array) -> jax.Array:
    """Uniform in [-sqrt 3, sqrt 3), unit standard deviation, from the upper 24 bits."""
    unit = (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-23) - jnp.float32(1)  # exact
    return (unit * jnp.float32(math.sqrt(3))).astype(jnp.bfloat16)


def _ternary(words: jax.Array, s: float) -> jax.Array:
    """-1 and 1 with probability 1/(2s) each, else 0; divided by their deviation 1/sqrt(s)."""
    edge = round(2**32 / (2 * s))
    sign = (words >= jnp.uint32(2**32 - edge)).astype(jnp.float32) - (
        words < jnp.uint32(edge)
    ).astype(jnp.float32)
    return (sign * jnp.float32(math.sqrt(s))).astype(jnp.bfloat16)
