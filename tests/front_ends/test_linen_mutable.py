"""linen layers of the user's own in calls that may change collections."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core.scope import DenyList

from randlora_jax import KernelLayout, LayerType, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["own"], init_weights=False)
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)


class Own(nn.Module):
    tells: bool = False

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (64, 64), jnp.bfloat16)
        if self.tells:
            self.sow("intermediates", "largest", jnp.abs(x).max())
        return x @ w.astype(jnp.float32)


class Net(nn.Module):
    tells: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(Own(self.tells, name="own")(x))


STATED = {"layer_types": {Own: LayerType(KernelLayout("i o"), leaf="w")}}


def wrapped(config=CONFIG, tells=False):
    net = Net(tells)
    variables = net.init(jax.random.key(0), X)
    model = get_peft_model(
        net.bind(variables), config, rngs=jax.random.key(1), sample_inputs=(X,), **STATED
    )
    return net, variables, model


@pytest.mark.parametrize("mutable", [["batch_stats"], "batch_stats", True, DenyList("params")])
def test_a_small_update_is_not_lost_in_rounded_weights(mutable):
    _, variables, model = wrapped()
    (delta,) = model.delta_weights().values()
    weights = variables["params"]["own"]["w"].astype(jnp.float32)
    model.set_scale("default", float(1e-3 * jnp.linalg.norm(weights) / np.linalg.norm(delta)))
    (delta,) = model.delta_weights().values()
    found, changed = model.apply(model.variables, X, mutable=mutable)
    assert "batch_stats" in changed
    with model.disable_adapter():
        base = model.apply(model.variables, X)
    share = np.asarray(X) @ delta.T
    assert np.linalg.norm(found - base - share) <= 1e-3 * np.linalg.norm(share)


def test_dropout_and_rows_beside_what_changes():
    _, _, model = wrapped(RandLoraConfig(r=4, target_modules=["own"], randlora_dropout=0.1))
    rngs = {"dropout": jax.random.key(2)}
    model.apply(model.variables, X, train=True, mutable=["batch_stats"], rngs=rngs)
    rows = ["default", "__base__"] * 32
    model.apply(model.variables, X, mutable=["intermediates"], adapter_names=rows)


def test_what_a_layer_sows_is_there():
    net, variables, model = wrapped(tells=True)
    _, sown = model.apply(model.variables, X, mutable=["intermediates"])
    _, expected = net.apply(variables, X, mutable=["intermediates"])
    assert sown["intermediates"]["own"] == expected["intermediates"]["own"]
