"""Adapter dropout of linen modules inside nnx ones: switched and drawn as that of nnx layers."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

X = jax.random.normal(jax.random.key(0), (5, 8))
CONFIG = RandLoraConfig(
    r=4, randlora_alpha=8, target_modules="all-linear", randlora_dropout=0.5, init_weights=False
)


class Drops(nn.Module):
    """A layer, and dropout of the base model's own wherever it is called with a rng for it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="dense")(x)
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(8, name="dense")(x), None


class Scanned(nn.Module):
    hands_on: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        split = dict.fromkeys(("params", *self.hands_on), True)
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, length=3)
        return scanned(name="stack")(x, None)[0]


STREAMS = {"none": None, "params": {"params": 0}, "default": {"default": 0}}
WITH_ONE = {"params": 0, "dropout": 1}


def net(streams, module=None):
    """A linen module in an nnx one."""
    rngs = None if streams is None else nnx.Rngs(**streams)
    inner = nnx.bridge.ToNNX(module or nn.Dense(8), rngs=rngs)
    nnx.bridge.lazy_init(inner, X, rngs=nnx.Rngs(0))
    return nnx.Sequential(inner)


def dropping(streams, module=None, seed=3):
    return get_peft_model(net(streams, module), CONFIG, rngs=nnx.Rngs(params=3, dropout=seed))


@pytest.mark.parametrize("streams", [*STREAMS.values(), WITH_ONE], ids=[*STREAMS, "dropout"])
def test_train_and_eval_switch_it(streams):
    model = dropping(streams)
    assert not np.allclose(model(X), model(X))
    model.eval()
    calm = model(X)
    np.testing.assert_array_equal(model(X), calm)
    np.testing.assert_allclose(model.merge_and_unload()(X), calm, rtol=1e-4, atol=1e-4)


def test_it_is_drawn_from_the_rngs_that_were_given():
    first, same, other = (dropping(None, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first(X), same(X))
    assert not np.allclose(first(X), other(X))


def test_it_keeps_the_mean():
    jitted, model = nnx.jit(lambda model, x: model(x)), dropping(None)
    mean = np.mean([jitted(model, X) for _ in range(400)], 0)
    model.eval()
    calm, base = model(X), net(None)(X)
    assert np.abs(mean - calm).max() < 0.2 * np.abs(calm - base).max()


def test_it_switches_no_dropout_of_the_base_model():
    config = dataclasses.replace(CONFIG, init_weights=True)  # adds nothing
    model = get_peft_model(net(None, Drops()), config, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(model(X), net(None, Drops())(X))


def test_one_opened_to_be_applied_drops_nothing(tmp_path):
    model = dropping(WITH_ONE)
    model.save_pretrained(tmp_path, names={".*": r"\g<0>"})
    model.eval()
    again = RandLoraModel.from_pretrained(net(WITH_ONE), tmp_path)
    np.testing.assert_array_equal(again(X), model(X))
    again.train()
    with pytest.raises(ConfigError, match=r"'default' is in training mode.*rngs=nnx.Rngs"):
        again(X)


@pytest.mark.parametrize("streams", [None, WITH_ONE])
def test_a_scan_inside_hands_its_rng_on_or_is_refused(streams):
    stream = "dropout" if streams else "randlora"
    views = {"layers/0/stack/dense": "s i o"}
    for hands_on in ((), (stream,)):
        given = net(streams, Scanned(hands_on))
        model = get_peft_model(given, CONFIG, rngs=nnx.Rngs(3), views=views)
        if hands_on:
            assert not np.allclose(model(X), model(X))
        else:
            with pytest.raises(ConfigError, match=rf"dense'.*split_rngs=.*'{stream}': True"):
                model(X)
        model.eval()
        np.testing.assert_array_equal(model(X), model(X))
