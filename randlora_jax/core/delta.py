"""RandLoRA's arithmetic, once, for every front end.

With n = ceil(min / r) bases and the slices A[:, :min], B[:max, :n]:

    A_flat[k*n + b, j] = lambda[k, b] * A[k, j] * gamma[b, j]     (r*n, min)
    B_flat[i, b*r + k] = B[i, b, k]                               (max, n*r)
    M                  = B_flat @ A_flat                          (max, min)
    delta_W (out, in)  = (alpha / r) * (M if min == in else M.T)

The two flattenings order (rank, basis) *differently*. That is PEFT's arithmetic
(``tuners/randlora/layer.py``), every released adapter depends on it, and the paper's own order
gives other numbers. Both flattenings are reshapes, so nothing is transposed in memory.

JAX kernels are (in, out), so functions here return delta_W.T and call it the delta.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from randlora_jax.core.bases import Bases


class Term(NamedTuple):
    """One adapter's share of one layer.

    lam: (r, n), gamma: (n, min), both float32; bases: the shared pair, at least as large as the
    layer slices; scaling: alpha / r.
    """

    lam: jax.Array
    gamma: jax.Array
    bases: Bases
    scaling: float


def sliced(term: Term, n_in: int, n_out: int) -> Term:
    """`term` with just the corners of its bases that an (in, out) matrix uses."""
    a, b = term.bases
    n = term.lam.shape[1]
    return term._replace(bases=Bases(a[:, : min(n_in, n_out)], b[: max(n_in, n_out), :n]))


@jax.custom_jvp
def product(lam: jax.Array, a: jax.Array, gamma: jax.Array) -> jax.Array:
    """lam (r, n), a (r, min) and gamma (n, min), multiplied to (r, n, min) in PEFT's order.

    The gradients of lam and gamma are products of matrices. Left to the multiplication they would
    be sums over products of arrays as large as the result, which XLA's CPU compiler writes out.
    """
    return lam[:, :, None] * a[:, None] * gamma


@partial(product.defjvp, symbolic_zeros=True)
def _(values: tuple[jax.Array, ...], steps: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    (lam, a, gamma), (lam_step, a_step, gamma_step) = values, steps
    outer = partial(jnp.einsum, "kb,bj->kbj", precision="highest")
    shares = (
        (lam_step, lambda: outer(lam_step, gamma) * a[:, None]),
        (gamma_step, lambda: outer(lam, gamma_step) * a[:, None]),
        (a_step, lambda: product(lam, a_step, gamma)),
    )
    moved = [share() for step, share in shares if not isinstance(step, SymbolicZero)]
    return product(lam, a, gamma), sum(moved[1:], moved[0])


def flat_factors(term: Term) -> tuple[jax.Array, jax.Array]:
    """B_flat (max, n*r) and scaled A_flat (r*n, min) of a sliced term, both float32."""
    r, n = term.lam.shape
    a, b = term.bases
    scaled = product(term.lam, a.astype(jnp.float32), term.gamma)
    a_flat = scaled.reshape(r * n, a.shape[1]) * term.scaling
    return b.reshape(b.shape[0], n * r).astype(jnp.float32), a_flat


def formed(b_flat: jax.Array, a_flat: jax.Array, wide: bool) -> jax.Array:
    """delta (in, out) of the flat factors; `wide`: in <= out, square layers included.

    Then delta_W is M, so delta is A_flat.T B_flat.T: neither is transposed in memory.
    """
    if wide:
        return lax.dot_general(a_flat, b_flat, (((0,), (1,)), ((), ())))
    return b_flat @ a_flat


def through(x: jax.Array, b_flat: jax.Array, a_flat: jax.Array, wide: bool) -> jax.Array:
    """x (..., in) @ delta by way of the flat factors, (..., out)."""
    if wide:
        return jnp.einsum("...j,sj->...s", x, a_flat) @ b_flat.T
    return (x @ b_flat) @ a_flat


def delta(term: Term, n_in: int, n_out: int) -> jax.Array:
    """delta_W.T, (in, out) in float32, scaling included."""
    return formed(*flat_factors(sliced(term, n_in, n_out)), n_in <= n_out)


def through_delta(x: jax.Array, term: Term, n_in: int, n_out: int) -> jax.Array:
    """x @ delta by forming delta: (..., in) to (..., out) in float32."""
    return x.astype(jnp.float32) @ delta(term, n_in, n_out)


def through_factors(x: jax.Array, term: Term, n_in: int, n_out: int) -> jax.Array:
    """x @ delta without forming delta: (..., in) to (..., out) in float32."""
    factors = flat_factors(sliced(term, n_in, n_out))
    return through(x.astype(jnp.float32), *factors, n_in <= n_out)
