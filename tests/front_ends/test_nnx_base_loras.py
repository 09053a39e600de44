"""A LoRA that an nnx model came with, wherever it is: frozen while ours trains, then as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

X = jax.random.normal(jax.random.key(0), (5, 8))
CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["up"])


class Mine(nnx.LoRAParam):
    """A type of LoRA of the user's own."""


class Net(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.own = nnx.LoRAParam(jnp.ones((8, 8)), note="kept")
        self.in_dict = nnx.data({"a": [Mine(jnp.ones((8, 8)))]})
        self.in_list = nnx.List([nnx.LoRAParam(jnp.ones((8, 8)))])
        self.again = nnx.data((self.own, self.in_dict["a"][0]))

    def loras(self):
        return [self.own, self.in_dict["a"][0], self.in_list[0]]

    def __call__(self, x):
        return self.up(x) + sum(x @ lora[...] for lora in self.loras())


@pytest.fixture
def wrapped():
    base = Net()
    plain = base(X)
    model = get_peft_model(base, CONFIG)
    np.testing.assert_array_equal(model(X), plain)
    return model


def paths(model):
    return [path for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam))]


def test_it_is_frozen_while_ours_trains(wrapped):
    assert len(paths(wrapped)) == 2
    assert all("randlora_" in str(path) for path in paths(wrapped))


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_types_and_sharing_are_as_before_in_the_end(wrapped, end):
    plain = wrapped(X)
    wrapped.model.own[...] *= 2
    base = getattr(wrapped, end)()
    assert [type(lora) for lora in base.loras()] == [nnx.LoRAParam, Mine, nnx.LoRAParam]
    assert base.again[0] is base.own and base.again[1] is base.in_dict["a"][0]
    assert base.own.get_metadata() == Net().own.get_metadata() and base.own.note == "kept"
    np.testing.assert_allclose(base(X), plain + X @ jnp.ones((8, 8)), atol=1e-5)
    assert len(paths(base)) == 3


def test_a_second_model_of_the_same_loras_keeps_them():
    base = Net()
    other = nnx.merge(*nnx.split(base))
    get_peft_model(base, CONFIG)
    assert [type(lora) for lora in other.loras()] == [nnx.LoRAParam, Mine, nnx.LoRAParam]


class Outer(nnx.Module):
    def __init__(self, inner):
        self.inner, self.up = inner, nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        self.own = nnx.LoRAParam(jnp.ones((8, 8)))

    def __call__(self, x):
        return self.up(self.inner(x)) @ self.own[...]


def test_a_wrapped_model_inside_keeps_what_it_trains_and_froze(wrapped):
    outer = get_peft_model(Outer(wrapped), CONFIG)
    assert len(paths(outer)) == 4 and not any("own" in path for path in paths(outer))
    released = outer.unload()
    assert type(released.own) is nnx.LoRAParam
    assert len(paths(wrapped)) == 2
    assert type(wrapped.unload().own) is nnx.LoRAParam
