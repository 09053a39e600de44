"""Adapter dropout of nnx models whose adapters are opened to be applied: off, as in PEFT."""

import jax
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

X = jax.random.normal(jax.random.key(0), (5, 8))
CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["layers.0"], randlora_dropout=0.5)


def net(rate=0.0):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(rate, rngs=rngs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with an adapter, and what a model with it computes without dropout."""
    model = get_peft_model(net(), CONFIG, rngs=nnx.Rngs(1))
    for _, leaf in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        leaf[...] += 0.1
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.warns(UserWarning, match="by its path in the JAX model"):
        model.save_pretrained(folder)
    model.eval()
    return folder, model(X)


def drops(model):
    return not np.allclose(model(X), model(X))


@pytest.mark.parametrize("rngs", [None, 2])
def test_one_opened_to_be_applied_drops_nothing(saved, rngs):
    folder, expected = saved
    rngs = None if rngs is None else nnx.Rngs(rngs)
    model = RandLoraModel.from_pretrained(net(), folder, rngs=rngs)
    np.testing.assert_array_equal(model(X), expected)
    np.testing.assert_allclose(model(X, adapter_names=["default"] * 5), expected, atol=1e-5)
    model.set_adapter("default")  # trained from here on, and off as in PEFT
    np.testing.assert_array_equal(model(X), expected)
    model.train()
    if rngs is None:
        with pytest.raises(ConfigError, match=r"'default' is in training mode.*rngs=nnx.Rngs"):
            model(X)
        model.eval()
        np.testing.assert_array_equal(model(X), expected)
    else:
        assert drops(model)


def test_one_loaded_beside_others_is_off_alone(saved):
    folder, expected = saved
    model = get_peft_model(net(0.5), CONFIG, rngs=nnx.Rngs(1))
    model.load_adapter(folder, "second")
    assert not model.model.layers[1].deterministic  # the base model's is the user's matter
    assert not model.model.layers[0].randlora_dropout["default"].deterministic
    model.eval()
    model.load_adapter(folder, "third")
    for name in ("second", "third"):
        model.set_adapter(name, inference_mode=True)
        np.testing.assert_array_equal(model(X), expected)


def test_one_opened_to_be_trained_drops_and_needs_rngs(saved):
    folder, _ = saved
    for refused in (
        lambda: RandLoraModel.from_pretrained(net(), folder, is_trainable=True),
        lambda: get_peft_model(net(), CONFIG),
    ):
        with pytest.raises(ConfigError, match="draws at random: pass rngs"):
            refused()
    model = RandLoraModel.from_pretrained(net(), folder, is_trainable=True, rngs=nnx.Rngs(2))
    assert drops(model)


def test_a_fresh_one_that_does_not_train_is_off():
    model = get_peft_model(net(), CONFIG, rngs=nnx.Rngs(1))
    model.add_adapter("fixed", CONFIG, trainable=False)
    assert model.model.layers[0].randlora_dropout["fixed"].deterministic
