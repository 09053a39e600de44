"""Models that have the same Variables: what one of them does, the others do not see."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model

X = jax.random.normal(jax.random.key(0), (5, 8))
CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["up", "down"])


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.down(nnx.relu(self.up(x))))


def trained_leaves(model):
    return jax.tree.leaves(nnx.state(model, AdapterParam))


def moved(config=CONFIG):
    """A model whose adapter adds something; what it computes without, and with."""
    model = get_peft_model(Net(), config)
    plain = model(X)
    for _, leaf in nnx.to_flat_state(nnx.state(model, AdapterParam)):
        leaf[...] += 0.1
    return model, plain, model(X)


def split(model):
    return nnx.merge(*nnx.split(model))


def view(model):
    return nnx.view(model, deterministic=True, raise_if_not_found=False)


NO_VIEW = pytest.mark.skipif(not hasattr(nnx, "view"), reason="this flax has no nnx.view")
each_copy = pytest.mark.parametrize("copied", [split, pytest.param(view, marks=NO_VIEW)])


def same(found, expected):
    """To rounding: of what is merged, once."""
    assert not np.allclose(expected, 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def kernels(model):
    return [layer.base_layer.kernel.get_raw_value() for layer in (model.model.up, model.model.down)]


def test_a_reference_stays_the_base_model_while_the_policy_is_merged():
    model, plain, adapted = moved()
    reference = split(model)
    reference.disable_adapter_layers()
    model.merge_adapter()
    np.testing.assert_array_equal(reference(X), plain)
    same(model(X), adapted)
    model.unmerge_adapter()
    np.testing.assert_array_equal(reference(X), plain)
    np.testing.assert_array_equal(model(X), adapted)
    # and the two are one backbone in memory again
    assert all(map(lambda a, b: a is b, kernels(model), kernels(reference)))


def test_a_reference_made_of_a_merged_model_unmerges_itself_alone():
    model, plain, adapted = moved()
    model.merge_adapter()
    reference = split(model)
    reference.disable_adapter_layers()
    np.testing.assert_array_equal(reference(X), plain)
    same(model(X), adapted)
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    np.testing.assert_array_equal(model(X), adapted)


@each_copy
def test_what_is_merged_in_one_is_not_in_the_other(copied):
    model, _, adapted = moved()
    copy = copied(model)
    model.merge_adapter()
    np.testing.assert_array_equal(copy(X), adapted)
    same(model(X), adapted)
    assert len(trained_leaves(copy)) == 4


@each_copy
def test_a_copy_that_is_merged_and_unloaded_leaves_the_model_alone(copied):
    config = dataclasses.replace(CONFIG, modules_to_save=["head"])
    model, _, adapted = moved(config)
    before = nnx.to_flat_state(nnx.state(model))
    same(copied(model).merge_and_unload()(X), adapted)
    np.testing.assert_array_equal(model(X), adapted)
    copied(model).unload()
    after = nnx.to_flat_state(nnx.state(model))
    assert [(p, id(x)) for p, x in after] == [(p, id(x)) for p, x in before]
    np.testing.assert_array_equal(model(X), adapted)


def test_who_freezes_the_others_adapter_is_told_of():
    model, _, adapted = moved()
    served = split(model)
    served.set_adapter("default", inference_mode=True)
    np.testing.assert_array_equal(served(X), adapted)
    told = r"is trained .* its leaves frozen .*nnx.clone"
    with pytest.warns(UserWarning, match=told):
        np.testing.assert_array_equal(model(X), adapted)
    with pytest.raises(ConfigError, match=told):
        model.get_nb_trainable_parameters()
    model.set_adapter("default")
    np.testing.assert_array_equal(model(X), adapted)
    with pytest.warns(UserWarning, match="is frozen in this model, and another one"):
        np.testing.assert_array_equal(served(X), adapted)


def test_a_clone_chooses_for_itself():
    model, _, adapted = moved()
    served = nnx.clone(model)
    assert all(map(lambda a, b: a is b, kernels(model), kernels(served)))
    served.set_adapter("default", inference_mode=True)
    np.testing.assert_array_equal(served(X), adapted)
    np.testing.assert_array_equal(model(X), adapted)
    served.merge_adapter()
    np.testing.assert_array_equal(model(X), adapted)
    assert len(trained_leaves(model)) == 4


def test_a_reference_that_is_off_for_a_while_freezes_for_that_while_and_says_so():
    model, plain, adapted = moved()
    reference = split(model)
    with reference.disable_adapter():
        np.testing.assert_array_equal(reference(X), plain)
        assert reference.get_nb_trainable_parameters()[0] == 0
        with pytest.warns(UserWarning, match="its leaves frozen that has the same Variables"):
            np.testing.assert_array_equal(model(X), adapted)
    np.testing.assert_array_equal(model(X), adapted)
    assert len(trained_leaves(model)) == 4
    reference.disable_adapter_layers()
    np.testing.assert_array_equal(reference(X), plain)
    np.testing.assert_array_equal(model(X), adapted)
    assert len(trained_leaves(model)) == 4


def loss(model):
    return (model(X) ** 2).mean()


def train(model, optimizer):
    slopes = nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
    optimizer.update(model, slopes)


def test_training_goes_on_after_a_merge():
    """With an optimizer, and a step that holds on to its Variables."""
    results = []
    for merges in (False, True):
        model, _, _ = moved()
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)
        step = nnx.cached_partial(nnx.jit(train), model, optimizer)
        step()
        if merges:
            model.merge_adapter()
            model.unmerge_adapter()
        step()
        train(model, optimizer)
        results.append(model(X))
    np.testing.assert_array_equal(*results)


def test_a_merged_model_is_updated_as_any():
    model, _, adapted = moved()
    model.merge_adapter()
    state = jax.tree.map(lambda x: 2 * x, nnx.state(model.model.head))
    nnx.update(model.model.head, state)
    same(model(X), 2 * adapted)
    graph, whole = nnx.split(model)
    same(jax.jit(lambda state: nnx.merge(graph, state)(X))(whole), 2 * adapted)


def test_no_gradient_is_taken_of_what_is_merged():
    model, _, _ = moved()
    model.merge_adapter()
    assert nnx.grad(lambda x, model: model(x).sum())(X, model).any()
    for run in (loss, nnx.jit(loss)):
        with pytest.raises(ConfigError, match=r"'default', which is merged .*unmerge_adapter\(\)"):
            nnx.grad(run, argnums=nnx.DiffState(0, AdapterParam))(model)


class Pair(NamedTuple):
    bias: nnx.Param
    other: nnx.Param


class Tupled(Net):
    """Holds Variables in a pytree of its own."""

    def __init__(self):
        super().__init__()
        self.pair = nnx.data(Pair(nnx.Param(jnp.ones(3)), nnx.Param(jnp.zeros(3))))

    def __call__(self, x):
        return super().__call__(x) + self.pair.bias[...]


def test_what_a_pytree_holds_is_replaced_as_all_else():
    model = get_peft_model(Tupled(), CONFIG)
    held = model.model.pair
    paths = {path: x for path, x in model._store.base_leaves().items() if "pair" in path}
    assert len(paths) == 2
    model._store.set_base_leaves({path: x + 5 for path, x in paths.items()})
    assert isinstance(model.model.pair, Pair)
    np.testing.assert_array_equal(model.model.pair.bias[...], 6)
    np.testing.assert_array_equal(held.bias[...], 1)
