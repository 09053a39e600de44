"""A step beside a quantised base: each pass reads a kernel for itself, and none is kept."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from quantised_nets import FRONT_ENDS, QUANTISE, X, wrapped

SIZES = [64 * 128, 128 * 32, 32 * 64]  # of the kernels


def as_function(model):
    """(a function of x, of what trains and of what does not, these two)."""
    if isinstance(model, nnx.Module):
        graph, *parts = nnx.split(model, nnx.LoRAParam, ...)
        return lambda x, *parts: nnx.merge(graph, *parts)(x), parts
    if not hasattr(model, "split"):  # linen's, not wrapped
        return lambda x, _, frozen: model.apply(frozen, x), ({}, model.variables)
    trained, frozen = model.split()
    return lambda x, t, frozen: model.apply({**frozen, "randlora": t}, x), (trained, frozen)


@FRONT_ENDS
def test_no_dequantised_kernel_is_kept_for_the_backward_pass(front_end):
    def kept(model):
        function, (trained, frozen) = as_function(model)
        _, backward = jax.vjp(lambda *at: function(*at, frozen), X, trained)
        held = [np.asarray(x) for x in jax.tree.leaves((trained, frozen))]
        large = [x for x in jax.tree.leaves(backward) if x.size in SIZES]
        floats = [x for x in large if jnp.issubdtype(x.dtype, jnp.floating)]
        return [x for x in floats if not any(np.array_equal(x, mine) for mine in held)]

    model, _ = wrapped(front_end, "nf4", 16)
    assert not kept(model)
    assert kept(QUANTISE[front_end]("nf4", 16))  # as its quantiser made it: the check can fail


@FRONT_ENDS
def test_what_a_kernel_is_read_from_is_another_value_to_the_backward_pass(front_end):
    """Or XLA would read it once for both; the scales too, which a TPU fused both readings over."""
    model, _ = wrapped(front_end, "nf4", 16)
    function, parts = as_function(model)
    slopes = jax.grad(lambda *at: (function(*at) ** 2).sum(), (0, 1))
    text = jax.jit(slopes).lower(X, *parts).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    for numbers, scales in (("64x128", "4x128"), ("128x32", "8x32"), ("32x4x16", "2x4x16")):
        read = f"tensor<{numbers}xui4>", f"tensor<{scales}xf32>"
        assert sum(all(array in line for array in read) for line in barriers) == 1
