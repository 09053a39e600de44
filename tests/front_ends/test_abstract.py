"""nnx models of shapes alone: wrapped, filled by whatever restores them, and run as any other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

CONFIG = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up", "down"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.down = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
    """Two stacks, one along the second axis of its arrays, and a layer that no adapter takes."""

    def __init__(self, rngs):
        for name, axis in (("blocks", 0), ("others", 1)):
            made = nnx.split_rngs(splits=2)(nnx.vmap(Block, in_axes=0, out_axes=axis))
            setattr(self, name, made(rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for blocks, axis in ((self.blocks, 0), (self.others, 1)):
            run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
            x = run(x, blocks)
        return self.head(x)


def shapes(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype), nnx.to_pure_dict(state))


def model_of(config):
    return get_peft_model(Net(nnx.Rngs(0)), config)


WAYS = {
    "an abstract model, wrapped": lambda config: get_peft_model(
        nnx.eval_shape(lambda: Net(nnx.Rngs(0))), config
    ),
    "wrapped within": lambda config: nnx.eval_shape(lambda: model_of(config)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change",
    [{}, {"modules_to_save": ["head"]}, {"very_sparse": True, "projection_source": "torch"}],
)
def test_it_has_the_shapes_and_once_filled_the_numbers(way, change):
    config = replace(CONFIG, **change)
    real, abstract = model_of(config), WAYS[way](config)
    nnx.update(real, jax.tree.map(lambda x: x + 0.3, nnx.state(real, AdapterParam)))
    state = nnx.state(abstract)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    assert shapes(state) == shapes(nnx.state(real))
    assert abstract.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    assert nnx.eval_shape(lambda model, x: model(x), abstract, X).shape == (5, 3)
    nnx.update(abstract, nnx.state(real))
    np.testing.assert_array_equal(abstract(X), real(X))
    abstract.merge_adapter()
    abstract.unmerge_adapter()
    abstract.set_adapter("default")
    assert nnx.graphdef(abstract) == nnx.graphdef(real)  # so no step compiles for it anew


def test_a_call_names_what_is_not_filled_yet(tmp_path):
    real, abstract = model_of(CONFIG), WAYS["wrapped within"](CONFIG)
    with pytest.raises(ConfigError, match="is abstract"):
        abstract.save_pretrained(tmp_path)
    parts = {
        "randlora_bases jax-0": nnx.PathContains("randlora_bases"),
        "blocks.down": nnx.Not(nnx.PathContains("head")),
        "head.bias": nnx.Param,
    }
    for named, part in parts.items():
        with pytest.raises(ConfigError, match=rf"'{named}.*is abstract.*nnx\.update"):
            abstract(X)
        nnx.update(abstract, nnx.state(real, part))
    np.testing.assert_array_equal(abstract(X), real(X))


def test_bases_that_no_checkpoint_has_are_drawn():
    real, abstract = model_of(CONFIG), WAYS["an abstract model, wrapped"](CONFIG)
    nnx.update(abstract, nnx.state(real, nnx.Not(nnx.PathContains("randlora_bases"))))
    with pytest.raises(ConfigError, match=r"randlora_bases jax-0.*draw_bases"):
        abstract(X)
    abstract.draw_bases()
    np.testing.assert_array_equal(abstract(X), real(X))


def test_an_adapter_is_loaded_into_an_abstract_model_with_its_numbers(tmp_path):
    real = model_of(CONFIG)
    nnx.update(real, jax.tree.map(lambda x: x + 0.3, nnx.state(real, AdapterParam)))
    real.save_pretrained(tmp_path)
    base = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    abstract = RandLoraModel.from_pretrained(base, tmp_path)
    left = nnx.state(abstract, nnx.Not(nnx.PathContains("randlora_bases")))
    unfilled = [x for x in jax.tree.leaves(left) if isinstance(x, jax.ShapeDtypeStruct)]
    assert len(unfilled) == len(jax.tree.leaves(nnx.state(Net(nnx.Rngs(0)), nnx.Param)))
    plain = nnx.PathContains("base_layer"), nnx.PathContains("head")
    nnx.update(abstract, nnx.state(real, nnx.Any(*plain)))
    np.testing.assert_array_equal(abstract(X), real(X))


def test_a_module_trained_whole_is_not_handed_back_without_numbers():
    abstract = WAYS["wrapped within"](replace(CONFIG, modules_to_save=["head"]))
    with pytest.raises(ConfigError, match="is abstract"):
        abstract.unload()


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["head"]}])
def test_what_is_trained_whole_is_planned_as_with_numbers(fields):
    config = replace(CONFIG, **fields)
    real = get_peft_model(Net(nnx.Rngs(0)), config)
    model = get_peft_model(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), config)
    assert model.explain(8) == real.explain(8)
    assert model.head.kernel.shape == (8, 3) and model.head.in_features == 8
    shapes = nnx.eval_shape(lambda model, x: model(x), model, X)
    assert shapes.shape == real(X).shape
