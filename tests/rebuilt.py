"""What is asked of every model of other people that tests/code_bases/ rebuilds small.

``benchmarks/code_bases.py`` runs the code bases themselves; the tests keep what it found right.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules="all-linear")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 5)))
X = jax.random.normal(jax.random.key(1), (2, 5, 8))


def known_as(name: str):
    """Gives a class the full name of one that is known."""

    def rename(kind):
        kind.__module__, _, kind.__qualname__ = name.rpartition(".")
        return kind

    return rename


def drawn(rngs, *shape):
    return nnx.Param(rngs.normal(shape))


def random(x):
    """Zeros become noise, other numbers are scaled."""
    noise = 0.2 * jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), x.dtype)
    return jnp.where(x == 0, noise, x * (1 + noise))


def gradients(model, inputs):
    """Lambda's and gamma's of every layer, of an adapter of random numbers; the output with it."""
    if isinstance(model, nnx.Module):
        trained = jax.tree.map(random, nnx.state(model, AdapterParam))
        graph, _, frozen = nnx.split(model, AdapterParam, ...)

        def loss(t, frozen):
            return (nnx.merge(graph, t, frozen)(*inputs) ** 2).mean()

        nnx.update(model, jax.jit(jax.grad(loss))(trained, frozen))
        found = model._store.state("default").layers
        nnx.update(model, trained)
        return found, model(*inputs)
    trained, frozen = model.split()
    trained = jax.tree.map(random, trained)

    def loss(trained):
        return (model.apply({**frozen, "randlora": trained}, *inputs) ** 2).mean()

    model.variables = {**frozen, "randlora": jax.jit(jax.grad(loss))(trained)}
    found = model._store.state("default").layers
    model.variables = {**frozen, "randlora": trained}
    return found, model(*inputs)


def check(make, inputs, names, folder, **said):
    """A model is adapted in the layers of `names`, as `check_beside`, and merged it is the same."""
    model, out = check_beside(make, inputs, names, folder, **said)
    model.merge_adapter()
    np.testing.assert_allclose(model(*inputs), out, rtol=1e-5, atol=1e-5 * float(abs(out).max()))
    return model


def check_beside(make, inputs, names, folder, **said):
    """A model is adapted in the layers of `names`, exactly, and read back; PEFT sees these names.

    Args:
      make: the model alone, always the same.
      names: of all adapted matrices.
    """
    alone = make()(*inputs)
    model = get_peft_model(make(), CONFIG, **said)
    assert sorted(model.targeted_module_names) == sorted(names)
    np.testing.assert_array_equal(model(*inputs), alone)
    found, out = gradients(model, inputs)
    assert float(jnp.abs(out - alone).max()) > 1e-3
    for layer, (lam, gamma) in found.items():
        assert jnp.abs(lam).max(axis=(-2, -1)).all(), layer
        assert jnp.abs(gamma).max(axis=(-2, -1)).all(), layer
    model.save_pretrained(folder)
    again = RandLoraModel.from_pretrained(make(), folder, **said)
    np.testing.assert_array_equal(again(*inputs), out)
    return model, out


def bound(module, *inputs):
    return module.bind(module.init(jax.random.key(0), *inputs))
