"""A step beside a quantised base: each pass dequantises a kernel for itself, and keeps none."""

import re
from collections import Counter

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
def test_the_compiler_takes_no_kernel_from_the_other_pass(front_end):
    """nf4 is read by a gather for each kernel and pass; one for both would wait between them."""

    def gathers(model):
        function, parts = as_function(model)
        slopes = jax.grad(lambda *at: (function(*at) ** 2).sum(), (0, 1))
        text = jax.jit(slopes).lower(X, *parts).compile().as_text()
        return Counter(int(size) for size in re.findall(r"f32\[(\d+),1\]\S* gather\(", text))

    model, _ = wrapped(front_end, "nf4", 16)
    assert gathers(model) == dict.fromkeys(SIZES, 2)
    assert gathers(QUANTISE[front_end]("nf4", 16)) == dict.fromkeys(SIZES, 1)  # it keeps them
