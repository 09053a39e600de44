"""Under jax_numpy_dtype_promotion="strict" a wrapped model runs wherever its layers do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

RANDOM = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)


def results(model, x, rows):
    """Outputs, for all alike and row by row, gradients, and the kernel with the adapter in it."""
    if isinstance(model, nnx.Module):
        graph, trained, frozen = nnx.split(model, AdapterParam, ...)
        run = lambda t, f, x, **how: nnx.merge(graph, t, f)(x, **how)  # noqa: E731
    else:
        trained, frozen = model.split()
        run = lambda t, f, *x, **how: model.apply({**f, "randlora": t}, *x, **how)  # noqa: E731

    @jax.jit
    def every(trained, frozen, x, rows):
        def loss(trained, x):
            y = run(trained, frozen, x)
            return (y.astype(jnp.float32) ** 2).sum(), y

        grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(trained, x)
        return grads, y, run(trained, frozen, x, adapter_names=rows)

    found = every(trained, frozen, x, model.rows(rows))
    model.merge_adapter()
    base = model.layers[0].kernel[...] if isinstance(model, nnx.Module) else model.variables
    return jax.tree.leaves((found, base))


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
@pytest.mark.parametrize("sizes", [(3, 16, 24), (70, 24, 16)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_it_runs_as_it_does_otherwise(dtype, sizes, front_end):
    tokens, n_in, n_out = sizes
    held = {"dtype": dtype, "param_dtype": dtype}

    def wrapped():
        if front_end == "nnx":
            base = nnx.Sequential(nnx.Linear(n_in, n_out, **held, rngs=nnx.Rngs(0)))
        else:
            base = nn.Sequential([nn.Dense(n_out, **held)])
            base = base.bind(base.init(jax.random.key(0), x))
        return get_peft_model(base, RANDOM, rngs=nnx.Rngs(1))

    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(tokens, n_in)), dtype)
        expected = results(wrapped(), x, ["default"] * tokens)
        with jax.numpy_dtype_promotion("strict"):
            found = results(wrapped(), x, ["default"] * tokens)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
