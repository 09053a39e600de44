"""Rows of one batch, each with adapters of its own, which share a pair of bases.

A row's delta is its own, but B_flat, nearly all of what is read, is the same for all of them. So
with few tokens a row (decoding) B is read once, and of each row's adapter just lambda and gamma:

    v[k, b] = sum_j x[j] A[k, j] gamma[b, j]
    y       = B_flat @ flatten(lambda * v)        rank slow, basis fast, as in `update`

That is for layers whose input is the smaller side; where the output is, it is the transpose. With
more tokens a row it pays to form A_flat for each, and with still more its delta (`RowOrder`).

A row may have several adapters at once: their deltas add up, and so do lambda * v and A_flat.
"""

import enum
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.update import (
    FlatFactors,
    Update,
    at_least_float32,
    formed_in,
    through,
    times,
    to_basis,
)


class RowOrder(enum.Enum):
    """What of a row's adapter is formed, before the row's tokens meet it."""

    TOKENS = "nothing"
    FACTORS = "A_flat for each row"
    DELTA = "delta_W for each row"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowUpdates:
    """What the rows of a batch get, each from adapters of its own, in one (in, out) matrix.

    Args:
      lam: (*stack, rows, parts, r, n), gamma: (*stack, rows, parts, n, min); `parts` adapters a
        row, whose deltas add up. Their scaling is in lambda: zero is no adapter.
      pair: the shared bases, at least as large as the matrix slices.
      matrix: (in, out).
      wide: what they make of inputs of 16 bits comes in float32, however many they are.
    """

    lam: jax.Array
    gamma: jax.Array
    pair: BasisPair
    matrix: tuple[int, int] = field(metadata={"static": True})
    wide: bool = field(default=False, metadata={"static": True})

    @property
    def in_is_smaller(self) -> bool:
        """in <= out."""
        return self.matrix[0] <= self.matrix[1]

    @property
    def flat_rank(self) -> int:
        """r * n, of all parts."""
        parts, r, n = self.lam.shape[-3:]
        return int(parts * r * n)

    def applied(self, x: jax.Array, order: RowOrder) -> jax.Array:
        """x (rows, ..., in) through each row's delta: (rows, ..., out).

        `lam` and `gamma` are of one matrix. Deltas are formed row after row, since each is as large
        as the kernel. The result is in float32 where tokens are few, else in x's dtype: as
        `through` has it.
        """
        mine = self.sliced()
        laid = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        y = (
            mine._through_tokens(laid)
            if order is RowOrder.TOKENS
            else mine._by_forming(laid, order)
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def sliced(self) -> "RowUpdates":
        """The same with just the corners of the bases that the matrix uses."""
        a, b = self.pair
        pair = BasisPair(a[:, : min(self.matrix)], b[: max(self.matrix), : self.lam.shape[-1]])
        return replace(self, pair=pair)

    def _factors(self, lam: jax.Array, gamma: jax.Array, dtype: DTypeLike) -> FlatFactors:
        """The flat factors of one row, in `dtype`; A_flat is the sum over its parts."""
        updates = [self.alone(*part).factors() for part in zip(lam, gamma, strict=True)]
        a_flat = sum((other.a for other in updates[1:]), updates[0].a)
        b_flat = self.pair.B.reshape(self.pair.B.shape[0], -1)
        b_flat, a_flat = b_flat.astype(dtype), a_flat.astype(dtype)
        return FlatFactors(b_flat, a_flat, self.in_is_smaller, self.wide)

    def _by_forming(self, x: jax.Array, order: RowOrder) -> jax.Array:
        """`applied` to x (rows, tokens, in), with A_flat of each row formed, or delta."""

        def row(x: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
            factors = self._factors(lam, gamma, formed_in(x.dtype))
            if order is RowOrder.FACTORS:
                return factors.applied(x)
            return through(x, factors.formed(), wide=self.wide)

        if order is RowOrder.FACTORS:
            return jax.vmap(row)(x, self.lam, self.gamma)
        return lax.map(lambda arrays: row(*arrays), (x, self.lam, self.gamma))

    def _through_tokens(self, x: jax.Array) -> jax.Array:
        """`applied` to x (rows, tokens, in), with nothing formed of a row's adapter."""
        wide = at_least_float32(x.dtype)
        a = self.pair.A.astype(formed_in(x.dtype) if wide == jnp.float32 else wide)
        b_flat = self.pair.B.reshape(self.pair.B.shape[0], -1).astype(x.dtype)
        r, n = self.lam.shape[-2:]
        lam, gamma = self.lam.astype(wide), self.gamma.astype(wide)
        parts = [(lam[:, i, None], gamma[:, i]) for i in range(lam.shape[1])]
        if self.in_is_smaller:
            mixed = _sum(lam * _narrowed(x, a, gamma) for lam, gamma in parts)
            return to_basis(mixed.reshape(*x.shape[:2], r * n), b_flat.T, x.dtype, wide=self.wide)
        mixed = times(x, b_flat, wide).reshape(*x.shape[:2], r, n)
        return _sum(_widened(lam * mixed, a, gamma) for lam, gamma in parts)

    def alone(self, lam: jax.Array, gamma: jax.Array) -> Update:
        """The update of a row, from one part of it."""
        return Update(lam, gamma, self.pair, 1.0, self.matrix)

    def changed(self) -> jax.Array:
        """(rows,): which have an adapter here at all."""
        rows = self.lam.ndim - 4
        axes = tuple(axis for axis in range(self.lam.ndim) if axis != rows)
        return (self.lam != 0).any(axes)


def _sum(arrays: Iterable[jax.Array]) -> jax.Array:
    return reduce(operator.add, arrays)


def _narrowed(x: jax.Array, a: jax.Array, gamma: jax.Array) -> jax.Array:
    """sum_j x[j] A[k, j] gamma[b, j]: x (rows, tokens, min) to (rows, tokens, r, n), not narrowed.

    By whatever makes fewer numbers of each of x's. Through gamma first, the product is one with the
    A that all rows share, and gamma is not rounded.

    Args:
      a: (r, min), in the dtype that is multiplied.
      gamma: (rows, n, min).
    """
    x = x[:, :, None]
    if gamma.shape[1] <= a.shape[0]:
        wide = at_least_float32(a.dtype)
        gamma = gamma[:, None]
        return times((x.astype(wide) * gamma).astype(a.dtype), a.T, wide).swapaxes(2, 3)
    return _by_row(x.astype(a.dtype) * a, gamma.swapaxes(1, 2).astype(a.dtype))


def _widened(mixed: jax.Array, a: jax.Array, gamma: jax.Array) -> jax.Array:
    """sum_kb mixed[k, b] A[k, j] gamma[b, j]: `_narrowed` transposed, (rows, tokens, min)."""
    mixed = mixed.astype(a.dtype)
    if gamma.shape[1] <= a.shape[0]:
        every = times(mixed.swapaxes(2, 3), a, at_least_float32(a.dtype)) * gamma[:, None]
    else:
        every = _by_row(mixed, gamma.astype(a.dtype))
        every = every * a.astype(every.dtype)
    # rows and tokens in one axis: XLA's CPU compiler takes twenty times as long to sum over two
    rows, tokens, *matrix = every.shape
    summed = every.reshape(rows * tokens, *matrix).sum(1)
    return summed.reshape(rows, tokens, matrix[-1])


def _by_row(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """x (rows, ..., in) @ each row's own of `matrices` (rows, in, out), in float32 or wider."""
    return jax.vmap(partial(times, comes_in=at_least_float32(x.dtype)))(x, matrices)
