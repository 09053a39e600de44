"""Parts of a wrapped nnx model, however a user gets hold of them, and copies of the whole."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from nnx_nets import CONFIG, X, changed, close

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model


def linear(seed, n_out=8):
    return nnx.Linear(8, n_out, rngs=nnx.Rngs(seed))


class Parted(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([linear(0), linear(1)])
        self.heads = nnx.Dict(a=linear(2, 3), b=linear(3, 2))
        self.notes = {"of": "the user"}

    def get_block(self, index):
        return self.blocks[index]

    def outputs(self, x):
        for block in self.blocks:
            x = block(x)
            yield x

    @property
    def last(self):
        return self.blocks[-1]

    @functools.cached_property
    def first_output(self):
        return self.blocks[0](X)


WAYS = {
    "a dict's items": lambda m: {name: head(X) for name, head in m.heads.items()},
    "a dict's values": lambda m: [head(X) for head in m.heads.values()],
    "a dict's get": lambda m: m.heads.get("a")(X),
    "a list's end": lambda m: [block(X) for block in m.blocks[1:]],
    "what a method returns": lambda m: m.get_block(1)(X),
    "what a method yields": lambda m: list(m.outputs(X)),
    "a property": lambda m: m.last(X),
    "a property that runs layers": lambda m: m.first_output,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_part_runs_with_its_adapters(way):
    model = get_peft_model(Parted(), CONFIG, rngs=nnx.Rngs(1))
    expected = WAYS[way](changed(Parted, model))
    jax.tree.map(close, WAYS[way](model), expected)


def test_what_holds_no_module_is_handed_out_itself():
    model = get_peft_model(Parted(), CONFIG, rngs=nnx.Rngs(1))
    assert model.notes is model.model.notes and len(model.heads) == 2 and "a" in model.heads


def new_kernel(seed):
    return nnx.Param(nnx.Rngs(seed).normal((8, 8)))


def put_in_a_layer(model):
    model.blocks[0].kernel = new_kernel(5)
    model.blocks[1].bias = nnx.Param(np.full(8, 5, np.float32))


PUT = {
    "through the wrapper": put_in_a_layer,
    "into the model": lambda model: put_in_a_layer(getattr(model, "model", model)),
    "in a layer's place": lambda model: setattr(model, "blocks", nnx.List([linear(5), linear(6)])),
    "as flax does": lambda model: model.set_attributes(nnx.Linear, dtype="bfloat16"),
}


@pytest.mark.parametrize("way", PUT)
def test_what_is_set_in_a_wrapped_model_is_what_runs(way):
    config = RandLoraConfig(r=4, target_modules=["blocks.0", "blocks.1"], init_weights=False)
    model = get_peft_model(Parted(), config, rngs=nnx.Rngs(1))
    before = list(Parted().outputs(X))
    PUT[way](model)
    plain = Parted()
    PUT[way](plain)
    with model.disable_adapter():
        found = list(model.outputs(X))
    jax.tree.map(np.testing.assert_array_equal, found, list(plain.outputs(X)))
    assert not np.allclose(found[-1], before[-1])


def test_what_is_set_takes_the_adapter_and_is_there_without_it():
    model = get_peft_model(Parted(), CONFIG, rngs=nnx.Rngs(1))
    block, new = model.model.blocks[0], new_kernel(5)
    block.kernel = new
    assert block.kernel is new and block.base_layer.kernel is new
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(block))} == {
        "base_layer",
        "randlora_lambda",
        "randlora_gamma",
    }
    expected = X @ (new[...] + model.delta_weights()["blocks.0"].T) + block.bias[...]
    close(model.blocks[0](X), expected)
    assert nnx.clone(model).unload().blocks[0].kernel[...].shape == (8, 8)
    assert model.unload().blocks[0].kernel is new


def test_a_part_of_a_wrapped_model_is_not_wrapped():
    model = get_peft_model(Parted(), CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ConfigError, match=r"part of a model that is wrapped already.*add_adapter"):
        get_peft_model(model.blocks, CONFIG)


class Branching(nnx.Module):
    def __init__(self):
        self.text, self.vision = linear(0), linear(1)

    def __call__(self, x, image=None):
        return self.text(x) if image is None else self.text(x) + self.vision(image)


def test_what_a_copy_must_reach_is_its_own():
    config = RandLoraConfig(r=4, target_modules=["text"])
    model = get_peft_model(Branching(), config)
    copy = nnx.clone(model)
    copy.add_adapter("both", CONFIG, rngs=nnx.Rngs(2))
    copy.set_adapter("both")
    model(X)
    with pytest.raises(ConfigError, match="'vision' did not run"):
        copy(X)


class Around(nnx.Module):
    def __init__(self, inner):
        self.inner, self.top = inner, linear(7)

    def __call__(self, x):
        return self.top(self.inner(x))


def test_all_layers_around_a_wrapped_model_are_those_it_has_not_adapted():
    inner = get_peft_model(Branching(), RandLoraConfig(r=4, target_modules=["text"]))
    before = inner(X)
    model = get_peft_model(Around(inner), CONFIG, rngs=nnx.Rngs(2), optional=["inner.*"])
    assert "top" in model.targeted_module_names
    assert not [name for name in model.targeted_module_names if "text" in name]
    top = linear(7)
    top.kernel[...] += model.delta_weights()["top"].T
    close(model(X), top(before))
    np.testing.assert_array_equal(model.unload().inner(X), before)


@pytest.mark.parametrize(
    "use",
    [
        lambda part: nnx.jit(lambda block: block(X))(part),
        nnx.state,
        nnx.split,
        lambda part: jax.tree.leaves({"part": part}),
        lambda part: jax.jit(lambda block: block(X))(part),
    ],
)
def test_a_part_is_no_pytree_and_says_what_is(use):
    model = get_peft_model(Parted(), CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ConfigError, match=r"this Linear is part of a wrapped.*Pass the model"):
        use(model.blocks[0])
