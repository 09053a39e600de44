"""Nothing is traced twice for one adapter; a gradient that takes in the bases is told."""

import warnings
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=3, randlora_alpha=6, target_modules="all-linear")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
TX = optax.adam(1e-2)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


def wrapped(seed=0, config=CONFIG):
    return get_peft_model(Net(nnx.Rngs(seed)), config)


@pytest.fixture
def traced():
    """What was traced, by name; `run` and `step` of an nnx model, which write it down."""
    names = []

    @nnx.jit
    def run(model, x):
        names.append("run")
        return model(x)

    @nnx.jit
    def step(model, optimizer, x):
        names.append("step")

        def loss(model):
            return (model(x) ** 2).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)

    return names, run, step


def test_a_reference_pass_between_steps_compiles_neither_again(traced):
    names, run, step = traced
    model = wrapped()
    optimizer = nnx.Optimizer(model, TX, wrt=AdapterParam)
    before = np.asarray(run(Net(nnx.Rngs(0)), X))
    for _ in range(3):
        with model.disable_adapter():
            np.testing.assert_array_equal(run(model, X), before)
        step(model, optimizer, X)
    assert not np.allclose(run(model, X), before)
    # the plain model, the adapter off, the adapter on
    assert names == ["run", "run", "step", "run"]


def test_a_cached_step_goes_on_training_the_model_after_a_reference_pass(traced):
    """As tunix's trainers run theirs."""
    names, _, step = traced
    model = wrapped()
    optimizer = nnx.Optimizer(model, TX, wrt=AdapterParam)
    cached = nnx.cached_partial(step, model, optimizer)
    for _ in range(2):
        before = np.asarray(model(X))
        with model.disable_adapter():
            model(X)
        cached(X)
        assert not np.allclose(model(X), before)
    assert names == ["step"]


def test_an_adapter_chosen_within_a_trace_is_the_one_that_trains():
    model = wrapped()
    model.add_adapter("two", CONFIG)
    nnx.jit(lambda model: model.set_adapter("two"))(model)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam))]
    assert len(paths) == 4 and all("two" in path for path in paths)


def test_another_file_under_a_name_that_was_there_runs_the_same_program(traced, tmp_path):
    names, run, _ = traced
    for i, alpha in enumerate((6, 6)):
        other = wrapped(config=replace(CONFIG, randlora_alpha=alpha))
        state = nnx.state(other, AdapterParam)
        nnx.update(other, jax.tree.map(lambda x, i=i: x + i + 1, state))
        other.save_pretrained(tmp_path / str(i))
    model = wrapped()
    outputs = []
    for name in ("0", "1", "0"):
        model.load_adapter(tmp_path / name, "served")
        model.set_adapter("served", inference_mode=True)
        outputs.append(np.asarray(run(model, X)))
        model.set_adapter("default")
        model.delete_adapter("served")
    assert names == ["run"]
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert not np.allclose(outputs[0], outputs[1])


def test_an_equal_model_wrapped_again_runs_what_was_compiled(traced):
    names, run, step = traced
    for seed in range(3):
        model = wrapped(seed)
        step(model, nnx.Optimizer(model, TX, wrt=AdapterParam), X)
        y = run(model, X)
        np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-6)  # this model's arrays
        np.testing.assert_allclose(y, nnx.clone(model).merge_and_unload()(X), rtol=1e-4, atol=1e-5)
    assert names == ["step", "run"]
    run(wrapped(config=replace(CONFIG, randlora_alpha=7)), X)
    run(wrapped(config=replace(CONFIG, projection_prng_key=1)), X)
    assert names == ["step", "run", "run", "run"]  # other adapters are other programs


def test_a_part_that_nnx_jit_met_still_belongs_to_its_model():
    """It puts static parts of the first model in place of those of a later one that is alike."""
    scale = nnx.jit(lambda layer: layer.kernel.set_value(layer.kernel[...] * 2))
    for seed in range(2):
        model = wrapped(seed)
        scale(model.model.up.base_layer)
        again = nnx.jit(lambda layer: None)
        again(model.model.up)
        assert model(X).shape == (5, 3)


def linen_model():
    net = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    return get_peft_model(net.bind(net.init(jax.random.key(0), X)), CONFIG)


def test_linen_compiles_once_for_each_adapter_and_once_for_none(tmp_path):
    names = []
    model = linen_model()
    model.add_adapter("two", CONFIG)

    @jax.jit
    def run(variables, x):
        names.append("run")
        return model.apply(variables, x)

    for name in ("default", "two") * 3:
        model.set_adapter(name)
        run(model.variables, X)
        with model.disable_adapter():
            run(model.variables, X)
    assert len(names) == 3
    linen_model().save_pretrained(tmp_path)
    for _ in range(2):
        model.load_adapter(tmp_path, "served")
        model.set_adapter("served", inference_mode=True)
        run(model.variables, X)
        model.set_adapter("two")
        model.delete_adapter("served")
    assert len(names) == 4


# Gradients.


def loss(model, x=X):
    return (model(x) ** 2).mean()


TOLD = pytest.warns(
    UserWarning,
    match=r"^You differentiate the whole base model; with an optimizer for nnx.Param it is being "
    r"trained. For the adapter alone: wrt=AdapterParam and .*DiffState\(0, AdapterParam\)",
)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit])
def test_a_gradient_that_takes_in_the_bases_is_told(jit):
    model = wrapped()
    with TOLD:
        grads = jit(nnx.grad(loss))(model)
    bases = jax.tree.leaves(grads["randlora_bases"])
    assert len(bases) == 2 and not any(np.any(g) for g in bases)
    with TOLD:
        nnx.grad(jit(loss))(model)


def test_gradients_of_anything_else_say_nothing():
    model = wrapped()
    base = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("randlora_bases")))
    graph, trained, rest = nnx.split(model, AdapterParam, ...)
    merged = lambda trained, x: nnx.merge(graph, trained, rest)(x)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrt in (AdapterParam, base):
            grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
            assert any(np.any(g) for g in jax.tree.leaves(grads))
        assert np.any(jax.grad(lambda x: loss(model, x))(X))
        jax.jvp(lambda x: model(x), (X,), (X,))
        jax.vmap(jax.grad(lambda x: model(x).sum()))(X)
        jax.grad(lambda t: jax.checkpoint(merged)(t, X).sum())(trained)
        jax.jvp(lambda t: merged(t, X), (trained,), (trained,))
        linen = linen_model()
        adapter, frozen = linen.split()
        jax.grad(lambda t: linen.apply({**frozen, "randlora": t}, X).sum())(adapter)


def test_jax_itself_refuses_a_gradient_of_ternary_bases():
    with pytest.raises(TypeError, match="got int8"):
        nnx.grad(loss)(wrapped(config=replace(CONFIG, sparse=True)))


def test_a_gradient_of_all_variables_is_told():
    linen = linen_model()
    with pytest.warns(UserWarning, match=r"^You differentiate .*model\.split\(\)"):
        jax.grad(lambda variables: linen.apply(variables, X).sum())(linen.variables)
