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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from randlora_jax.bases import Bases


class Term(NamedTuple):
    """One adapter's share of one layer.

    lam: (r, n), gamma: (n, min), both float32; bases: the shared pair, at least as large as the
    layer slices; scaling: alpha / r.
    """

    lam: jax.Array
    gamma: jax.Array
    bases: Bases
    scaling: float


def flat_factors(term: Term, largest: int) -> tuple[jax.Array, jax.Array]:
    """B_flat (max, n*r) in the bases' dtype and scaled A_flat (r*n, min) in float32."""
    r, n = term.lam.shape
    smallest = term.gamma.shape[1]
    a = term.bases.A[:, None, :smallest].astype(jnp.float32)  # (r, 1, min)
    a_flat = (term.lam[:, :, None] * a * term.gamma).reshape(r * n, smallest) * term.scaling
    b_flat = term.bases.B[:largest, :n].reshape(largest, n * r)
    return b_flat, a_flat


def delta(term: Term, n_in: int, n_out: int) -> jax.Array:
    """delta_W.T, (in, out) in float32, scaling included."""
    b_flat, a_flat = flat_factors(term, max(n_in, n_out))
    b_flat = b_flat.astype(jnp.float32)
    if n_in <= n_out:  # min == in, square layers included: delta_W is M, so here A_flat.T B_flat.T
        return lax.dot_general(a_flat, b_flat, (((0,), (1,)), ((), ())))
    return b_flat @ a_flat


def through_delta(x: jax.Array, term: Term, n_in: int, n_out: int) -> jax.Array:
    """x @ delta by forming delta: (..., in) to (..., out) in float32."""
    return x.astype(jnp.float32) @ delta(term, n_in, n_out)


def through_factors(x: jax.Array, term: Term, n_in: int, n_out: int) -> jax.Array:
    """x @ delta without forming delta: (..., in) to (..., out) in float32."""
    b_flat, a_flat = flat_factors(term, max(n_in, n_out))
    b_flat = b_flat.astype(jnp.float32)
    x = x.astype(jnp.float32)
    if n_in <= n_out:
        return jnp.einsum("...j,sj->...s", x, a_flat) @ b_flat.T
    return (x @ b_flat) @ a_flat
