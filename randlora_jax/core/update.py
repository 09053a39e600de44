"""RandLoRA's arithmetic, once, for every front end: an update of one layer, as a value.

With n = ceil(min / r) bases and the slices A[:, :min], B[:max, :n]:

    A_flat[k*n + b, j] = lambda[k, b] * A[k, j] * gamma[b, j]     (r*n, min)
    B_flat[i, b*r + k] = B[i, b, k]                               (max, n*r)
    M                  = B_flat @ A_flat                          (max, min)
    delta_W (out, in)  = (alpha / r) * (M if min == in else M.T)

The two flattenings order (rank, basis) *differently*. That is PEFT's arithmetic
(``tuners/randlora/layer.py``), every released adapter depends on it, and the paper's own order
gives other numbers. Both flattenings are reshapes, so nothing is transposed in memory.

JAX kernels are (in, out), so functions here return delta_W.T and call it delta.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from randlora_jax.core.bases import BasisPair


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """What sums with a delta are made in: float32, or `dtype` where that holds more."""
    wider = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 4
    return dtype if wider else jnp.float32


def holds_sums(dtype: DTypeLike) -> bool:
    """Whether numbers of `dtype` can take a delta: floats of 16 bits or more.

    Integers cannot, nor floats of 8 bits or fewer, which lose it: quantisers count in them.
    """
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 1


def summed(arrays: Sequence[jax.Array]) -> jax.Array:
    """Their sum, in the widest of their dtypes; JAX may be told to promote none by itself."""
    widest = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    first, *others = (x.astype(widest) for x in arrays)
    return sum(others, first)


@jax.custom_jvp
def product(lam: jax.Array, a: jax.Array, gamma: jax.Array) -> jax.Array:
    """lam (r, n), a (r, min) and gamma (n, min), multiplied to (r, n, min) in PEFT's order.

    The gradients of lam and gamma are products of matrices. Left to the multiplication they would
    be sums over products of arrays as large as the result, which XLA's CPU compiler writes out.
    """
    return lam[:, :, None] * a[:, None] * gamma[None]


@partial(product.defjvp, symbolic_zeros=True)
def _(values: tuple[jax.Array, ...], steps: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (lam, a, gamma), (lam_step, a_step, gamma_step) = values, steps

    def outer(lam: jax.Array, gamma: jax.Array) -> jax.Array:  # "kb,bj->kbj"
        axes = (((), ()), ((1,), (0,)))
        by_basis = lax.dot(lam, gamma, dimension_numbers=axes, precision="highest")
        return by_basis.swapaxes(0, 1)

    shares = (
        (lam_step, lambda: outer(lam_step, gamma) * a[:, None]),
        (gamma_step, lambda: outer(lam, gamma_step) * a[:, None]),
        (a_step, lambda: product(lam, a_step, gamma)),
    )
    moved = [share() for step, share in shares if not isinstance(step, SymbolicZero)]
    return product(lam, a, gamma), sum(moved[1:], moved[0])


def times(x: jax.Array, matrix: jax.Array, comes_in: DTypeLike | None = None) -> jax.Array:
    """x (..., in) @ matrix (in, out): (..., out), in `comes_in` or the dtype of both.

    Not by ``@`` or einsum: they go through ``lax.dot_general``, which qwix, while a model runs that
    it quantised, replaces by its own; what an adapter multiplies would be rounded as the model's
    activations are.
    """
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot(x, matrix, dimension_numbers=axes, preferred_element_type=comes_in)


def formed_in(dtype: DTypeLike) -> DTypeLike:
    """What delta is formed in for a layer that multiplies in `dtype`.

    bfloat16 for bfloat16, where a delta is rounded to that in any case; else float32. The factors
    are smaller than delta: float16 would lose them, as it does not reach as far down as float32.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def through(
    x: jax.Array, matrix: jax.Array, *, basis: bool = False, wide: bool = False
) -> jax.Array:
    """x (..., in) @ matrix (in, out), multiplied in x's dtype.

    It comes in float32 where that is no larger than `matrix`, for rows so few that rounding them
    would save nothing; else in x's dtype.

    Args:
      x: in the layer's dtype.
      matrix: a delta, or one of its factors.
      basis: that factor which has no lambda and gamma in it.
      wide: it comes in float32 in any case.
    """
    comes_in = _comes_in(x, matrix, wide=wide)
    scales = x.dtype == jnp.float16 and not basis
    return _through(x, matrix, comes_in, math.inf if scales else None).astype(comes_in)


def _comes_in(x: jax.Array, matrix: jax.Array, *, wide: bool = False) -> DTypeLike:
    """What `through` returns."""
    few = x.size // x.shape[-1] <= matrix.shape[0]
    return jnp.float32 if (few or wide) and x.dtype.itemsize < 4 else x.dtype


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _through(x: jax.Array, matrix: jax.Array, comes_in: DTypeLike, most: float | None) -> jax.Array:
    """The product, summed in `comes_in`. Its gradients are multiplied in x's dtype.

    Left to JAX, what is summed in float32 would be multiplied in float32 backwards. float16 does
    not reach as far down as float32: there `matrix` is brought to where it holds 18 bits, and the
    result brought back, in float32. Gradients are as large as elsewhere, and are not scaled.

    Args:
      most: what `matrix` may be divided by; None for nothing, and a result in `comes_in`.
    """
    unit = _unit(matrix, most) if most else None
    scaled = (matrix if unit is None else matrix / unit).astype(x.dtype)
    y = times(x, scaled, comes_in)
    return y if unit is None else y.astype(jnp.float32) * unit


def _unit(matrix: jax.Array, most: float) -> jax.Array:
    """What float16 counts `matrix` in."""
    peak = jnp.abs(matrix).max()
    return jnp.where(peak > 0, jnp.minimum(64 * peak, most), 1).astype(jnp.float32)


@partial(_through.defjvp, symbolic_zeros=True)
def _(
    comes_in: DTypeLike, most: float | None, values: tuple[Any, ...], steps: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    (x, matrix), (x_step, matrix_step) = values, steps
    y = _through(x, matrix, comes_in, most)
    shares = (
        # a cotangent is multiplied by the unit first: more than one, and it would overflow
        (x_step, lambda: _through(x_step, matrix, x.dtype, most and 1.0)),
        (matrix_step, lambda: times(x, matrix_step.astype(x.dtype))),
    )
    moved = [share() for step, share in shares if not isinstance(step, SymbolicZero)]
    return y, summed(moved).astype(y.dtype)


def to_basis(v: jax.Array, basis: jax.Array, dtype: DTypeLike, *, wide: bool) -> jax.Array:
    """v (..., flat rank) @ basis (flat rank, out): multiplied in `dtype`, as `through`."""
    if dtype == jnp.float16:
        return _to_basis(v, basis, wide)
    return through(v.astype(dtype), basis, basis=True, wide=wide)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _to_basis(v: jax.Array, basis: jax.Array, wide: bool) -> jax.Array:
    """`to_basis` in float16, of v in float32.

    B's numbers are about one. So a cotangent times B is about its norm, which float16 might not
    hold: there it is taken in units of that (`_root`), and brought back in float32.
    """
    return through(v.astype(jnp.float16), basis, basis=True, wide=wide)


@partial(_to_basis.defjvp, symbolic_zeros=True)
def _(wide: bool, values: tuple[Any, ...], steps: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (v, basis), (v_step, basis_step) = values, steps
    y, far = _to_basis(v, basis, wide), _root(basis.shape[1])
    half = partial(jnp.asarray, dtype=jnp.float16)
    shares = (
        (v_step, lambda: times(half(v_step * far), half(basis / far))),
        (basis_step, lambda: times(half(v), half(basis_step))),
    )
    moved = [share() for step, share in shares if not isinstance(step, SymbolicZero)]
    return y, summed(moved).astype(y.dtype)


def _root(size: int) -> float:
    """Of `size`, or a little more: a power of two, which rounds nothing."""
    return float(2 ** math.ceil(math.log2(size) / 2))


class FlatFactors(NamedTuple):
    """B_flat (max, n*r) and scaled A_flat (r*n, min) of one matrix, of one dtype.

    in_is_smaller: in <= out, square matrices included. Then delta_W is M, so delta is
    A_flat.T B_flat.T: neither is transposed in memory.
    wide: as of an `Update`.
    """

    b: jax.Array
    a: jax.Array
    in_is_smaller: bool
    wide: bool

    def formed(self) -> jax.Array:
        """Delta (in, out)."""
        if self.in_is_smaller:
            return lax.dot(self.a, self.b, dimension_numbers=(((0,), (1,)), ((), ())))
        return times(self.b, self.a)

    def applied(self, x: jax.Array) -> jax.Array:
        """x (..., in) @ delta without forming delta, (..., out), as `through` it.

        B's numbers are about one, so x @ B_flat is about the norm of x, and float16 might not reach
        as far up. There its root of `in` goes from B to A, and eight times as much: then it holds
        whatever x does.
        """
        if x.dtype == jnp.float16:
            return self._applied_in_float16(x)
        if self.in_is_smaller:
            return to_basis(through(x, self.a.T), self.b.T, x.dtype, wide=self.wide)
        return through(times(x, self.b.astype(x.dtype)), self.a, wide=self.wide)

    def _applied_in_float16(self, x: jax.Array) -> jax.Array:
        if self.in_is_smaller:
            far = _root(self.b.shape[0])  # as of the cotangents, which A's gradient is made of
            a = (self.a * far).T
            v = _through(x, a, _comes_in(x, a), math.inf) / far
            return to_basis(v, self.b.T, x.dtype, wide=self.wide)
        far = 8 * _root(x.shape[-1])
        v = times(x, (self.b / far).astype(x.dtype))
        return through(v, self.a * far, wide=self.wide)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Update:
    """What one adapter adds to one (in, out) matrix, or to each matrix of a stack: a pytree.

    Args:
      lam: (*stack, r, n), gamma: (*stack, n, min); float32, or the layer's own dtype.
      pair: the shared bases, at least as large as the matrix slices.
      scaling: alpha / r, times what the product of two integers of ternary bases stands for.
      matrix: (in, out).
      wide: what it makes of inputs of 16 bits comes in float32, however many they are.
    """

    lam: jax.Array
    gamma: jax.Array
    pair: BasisPair
    scaling: float = field(metadata={"static": True})
    matrix: tuple[int, int] = field(metadata={"static": True})
    wide: bool = field(default=False, metadata={"static": True})

    @property
    def in_is_smaller(self) -> bool:
        """in <= out."""
        return self.matrix[0] <= self.matrix[1]

    @property
    def flat_rank(self) -> int:
        """r * n: how many rows A_flat has."""
        r, n = self.lam.shape[-2:]
        return int(r * n)

    def sliced(self) -> "Update":
        """The same with just the corners of the bases that the matrix uses."""
        a, b = self.pair
        pair = BasisPair(a[:, : min(self.matrix)], b[: max(self.matrix), : self.lam.shape[-1]])
        return replace(self, pair=pair)

    def factors(self, dtype: DTypeLike = jnp.float32) -> FlatFactors:
        """The flat factors of a sliced update of one matrix, in `dtype`."""
        r, n = self.lam.shape
        a, b = self.pair
        wide = (x.astype(jnp.float32) for x in (self.lam, a, self.gamma))
        scaled = product(*wide)
        a_flat = scaled.reshape(r * n, a.shape[1]) * self.scaling
        b_flat = b.reshape(b.shape[0], n * r)
        b_flat, a_flat = b_flat.astype(dtype), a_flat.astype(dtype)
        return FlatFactors(b_flat, a_flat, self.in_is_smaller, self.wide)

    def formed(
        self,
        cut: "Callable[[Update], Update] | None" = None,
        dtype: DTypeLike = jnp.float32,
    ) -> jax.Array:
        """Delta of every matrix, (*stack, in, out), scaling included.

        Args:
          cut: slices the update of one matrix, and says where its parts shall lie on a mesh.
          dtype: what it is multiplied in, and comes in.
        """

        def one(lam: jax.Array, gamma: jax.Array) -> jax.Array:
            update = replace(self, lam=lam, gamma=gamma)
            return (cut(update) if cut else update.sliced()).factors(dtype).formed()

        for _ in range(self.lam.ndim - 2):
            one = jax.vmap(one)
        return one(self.lam, self.gamma)

    def applied(self, x: jax.Array, *, factored: bool) -> jax.Array:
        """x (..., in) @ delta of a single matrix: (..., out), multiplied in x's dtype.

        Args:
          factored: without forming delta.
        """
        factors = self.sliced().factors(formed_in(x.dtype))
        return factors.applied(x) if factored else through(x, factors.formed(), wide=self.wide)
