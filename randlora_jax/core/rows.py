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
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.update import FlatFactors, Update, formed_in, through, times

Trained = tuple[jax.Array, jax.Array]  # lambda and gamma


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
    """

    lam: jax.Array
    gamma: jax.Array
    pair: BasisPair
    matrix: tuple[int, int] = field(metadata={"static": True})

    @property
    def flat_rank(self) -> int:
        """r * n, of all parts."""
        parts, r, n = self.lam.shape[-3:]
        return int(parts * r * n)

    def applied(self, x: jax.Array, order: RowOrder) -> jax.Array:
        """x (rows, tokens, in) through each row's delta: (rows, tokens, out), in x's dtype.

        `lam` and `gamma` are of one matrix. Deltas are formed row after row, since each is as large
        as the kernel.
        """
        pair = self._sliced()

        def row(x: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
            if order is RowOrder.TOKENS:
                return self._through_tokens(x, lam, gamma, pair)
            factors = self._factors(lam, gamma, pair, formed_in(x.dtype))
            if order is RowOrder.FACTORS:
                return factors.applied(x).astype(x.dtype)
            return through(x, factors.formed()).astype(x.dtype)

        rows = x, self.lam, self.gamma
        if order is RowOrder.DELTA:
            return lax.map(lambda arrays: row(*arrays), rows)
        return jax.vmap(row)(*rows)

    def _sliced(self) -> BasisPair:
        """The corners of the bases that the matrix uses."""
        a, b = self.pair
        n = self.lam.shape[-1]
        return BasisPair(a[:, : min(self.matrix)], b[: max(self.matrix), :n])

    def _factors(
        self, lam: jax.Array, gamma: jax.Array, pair: BasisPair, dtype: DTypeLike
    ) -> FlatFactors:
        """The flat factors of one row, in `dtype`; A_flat is the sum over its parts."""
        each = replace(self, pair=pair)
        updates = [each.alone(*part).factors() for part in zip(lam, gamma, strict=True)]
        a_flat = sum((other.a for other in updates[1:]), updates[0].a)
        b_flat = pair.B.reshape(pair.B.shape[0], -1)
        return FlatFactors(b_flat.astype(dtype), a_flat.astype(dtype), updates[0].in_is_smaller)

    def _through_tokens(
        self, x: jax.Array, lam: jax.Array, gamma: jax.Array, pair: BasisPair
    ) -> jax.Array:
        """x (tokens, in) of one row through its delta, (tokens, out), in x's dtype."""
        dtype = formed_in(x.dtype)
        a, gamma = pair.A.astype(dtype), gamma.astype(dtype)
        b_flat = pair.B.reshape(pair.B.shape[0], -1).astype(x.dtype)
        r, n = lam.shape[-2:]
        if self.matrix[0] <= self.matrix[1]:
            seen = x[:, None].astype(dtype) * a  # (tokens, r, min)
            parts = [
                lam[i] * times(seen, gamma[i].T, jnp.float32) for i in range(lam.shape[0])
            ]  # (tokens, r, n)
            mixed = sum(parts[1:], parts[0]).reshape(-1, r * n)
            return through(mixed.astype(x.dtype), b_flat.T, basis=True).astype(x.dtype)
        mixed = times(x, b_flat, jnp.float32).reshape(-1, r, n)
        parts = [
            times((lam[i] * mixed).astype(dtype), gamma[i], jnp.float32)
            for i in range(lam.shape[0])
        ]  # (tokens, r, min)
        return (sum(parts[1:], parts[0]) * a).sum(1).astype(x.dtype)

    def by_row(self) -> list[Trained]:
        """Lambda (rows, *stack, r, n) and gamma (rows, *stack, n, min) of each part."""
        rows = self.lam.ndim - 4
        both = [jnp.moveaxis(x, (rows, rows + 1), (1, 0)) for x in (self.lam, self.gamma)]
        return list(zip(*both, strict=True))

    def alone(self, lam: jax.Array, gamma: jax.Array) -> Update:
        """The update of a row, from one part of it."""
        return Update(lam, gamma, self.pair, 1.0, self.matrix)

    def changed(self) -> jax.Array:
        """(rows,): which have an adapter here at all."""
        rows = self.lam.ndim - 4
        axes = tuple(axis for axis in range(self.lam.ndim) if axis != rows)
        return (self.lam != 0).any(axes)
