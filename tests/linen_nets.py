"""What tests of linen models share: wrapping one, and holding its call to W + delta."""

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import RandLoraConfig, get_peft_model

X = jax.random.normal(jax.random.key(2), (5, 8))
TOKENS = jax.random.normal(jax.random.key(3), (2, 5, 8))
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(4)}


def wrapped(net, *args, config=CONFIG, init=None, **rules):
    """`net`, initialised by a call with `args` (or by its method `init`), with an adapter."""
    variables = net.init(RNGS, *args, method=init)
    return get_peft_model(net.bind(variables), config, rngs=jax.random.key(1), **rules)


def close(found, expected):
    """Two trees of arrays agree to float32's rounding."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1, np.abs(b).max()))


def slopes(model, *args, jit=False, **kwargs):
    """Gradients of the trained leaves."""
    trained, frozen = model.split()

    def loss(trained):
        out = model.apply({**frozen, "randlora": trained}, *args, **kwargs)
        return sum(jnp.sum(jnp.asarray(x, jnp.float32) ** 2) for x in jax.tree.leaves(out))

    return (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(trained)


def assert_runs_as_merged(model, *args, **kwargs):
    """Called, jitted, differentiated, a model is the plain module with W + delta for its kernels.

    Every lambda and gamma has a gradient. The model is unloaded in the end.
    """
    found = model.apply(model.variables, *args, **kwargs)
    jitted = jax.jit(lambda variables: model.apply(variables, *args, **kwargs))(model.variables)
    plain, under_jit = slopes(model, *args, **kwargs), slopes(model, *args, jit=True, **kwargs)
    assert all(np.any(g) for g in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(under_jit), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3 * np.abs(b).max())
    with model.disable_adapter():
        base = model.apply(model.variables, *args, **kwargs)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found, base)), strict=True)]
    assert max(moved) > 1e-2
    module, variables = model.merge_and_unload().unbind()
    expected = module.apply(variables, *args, **kwargs)
    close(found, expected)
    close(jitted, expected)
