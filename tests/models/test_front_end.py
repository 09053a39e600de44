"""Front ends make themselves known, and a user's own is ten lines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model, register_front_end
from randlora_jax.front_ends.pytree import PytreeRandLora
from randlora_jax.models import front_end

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["up", "down"], init_weights=False)


class Dense:
    """A model of a library that nobody knows."""

    def __init__(self, up, down):
        self.up, self.down = up, down

    def __call__(self, x):
        return jnp.tanh(x @ self.up) @ self.down


@pytest.fixture
def registered():
    """What is registered within is forgotten."""
    before = list(front_end._front_ends)
    yield
    front_end._front_ends[:] = before


def test_a_users_own_front_end_is_ten_lines(registered):
    @register_front_end("a Dense", accepts=lambda model, rules: isinstance(model, Dense))
    class DenseRandLora(PytreeRandLora):
        def __init__(self, model, rules):
            super().__init__({"up": {"kernel": model.up}, "down": {"kernel": model.down}}, rules)

        def __call__(self, x):
            merged = self.merged(self.variables)
            return Dense(merged["up"]["kernel"], merged["down"]["kernel"])(x)

    keys = jax.random.split(jax.random.key(0))
    base = Dense(jax.random.normal(keys[0], (8, 6)), jax.random.normal(keys[1], (6, 3)))
    views = {"up|down": "i o"}
    model = get_peft_model(base, CONFIG, views=views, rngs=jax.random.key(1))
    deltas = model.delta_weights()
    expected = jnp.tanh(X @ (base.up + deltas["up"].T)) @ (base.down + deltas["down"].T)
    np.testing.assert_allclose(model(X), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(model(X), base(X), atol=0.1)


def test_what_nobody_accepts_is_refused_with_all_that_is_accepted(registered):
    with pytest.raises(ConfigError, match=r"cannot wrap a Dense.*nnx\.Module.*linen.*pytree"):
        get_peft_model(Dense(None, None), CONFIG)


def test_what_holds_a_linen_module_is_no_hugging_face_model_by_that():
    holder = Dense(None, None)
    holder.module = nn.Dense(8)
    with pytest.raises(ConfigError, match="cannot wrap a Dense: expected "):
        get_peft_model(holder, CONFIG)


class Explaining(nnx.Module):
    """Has a method that every wrapper has."""

    def __init__(self):
        self.up = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(6, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(self.up(x))

    def explain(self):
        return "mine"


def test_a_hidden_method_is_said():
    with pytest.warns(UserWarning, match="'explain' of Explaining cannot be reached") as caught:
        get_peft_model(Explaining(), RandLoraConfig(r=2, target_modules=["up", "down"]))
    assert caught[0].filename == __file__
