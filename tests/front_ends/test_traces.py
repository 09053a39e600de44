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

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model

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


@pytest.mark.parametrize("alphas, programs", [((6, 6), 1), ((6, 60), 2)])
def test_another_file_under_a_name_that_was_there(traced, tmp_path, alphas, programs):
    names, run, _ = traced
    for i, alpha in enumerate(alphas):
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
        np.testing.assert_allclose(outputs[-1], model(X), rtol=1e-4, atol=1e-5)
        model.set_adapter("default")
        model.delete_adapter("served")
    assert names == ["run"] * programs
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


def linen_model(config=CONFIG):
    net = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    return get_peft_model(net.bind(net.init(jax.random.key(0), X)), config)


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


# Variables tell whose they are: what no array tells of an adapter is in their structure.


def pytree_model(config=CONFIG):
    params = linen_model().variables["params"]
    return get_peft_model(params, config, views={".*kernel": "i o"})


def bert_model(config=CONFIG):
    from transformers import BertConfig, FlaxBertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "vocab_size": 31}
    base = FlaxBertModel(BertConfig(**sizes, intermediate_size=6, max_position_embeddings=8))
    return get_peft_model(base, config)


def run_pytree(model, variables):
    return X @ model.merged(variables)["layers_0"]["kernel"]


def run_linen(model, variables):
    return model.apply(variables, X)


def run_bert(model, variables):
    return model(np.arange(4)[None], params=variables)[0]


KINDS = {
    "linen": (linen_model, run_linen),
    "pytree": (pytree_model, run_pytree),
    "hugging_face": (bert_model, run_bert),
}
each_kind = pytest.mark.parametrize(
    "kind", ["linen", "pytree", pytest.param("hugging_face", marks=pytest.mark.torch)]
)


def jitted(model, run):
    """`run` of the model's own variables, compiled; what was traced; equal to it uncompiled."""
    names = []

    @jax.jit
    def compiled(variables):
        names.append("run")
        return run(model, variables)

    def checked():
        out = np.asarray(compiled(model.variables))
        np.testing.assert_allclose(out, run(model, model.variables), rtol=1e-4, atol=1e-5)
        return out

    return checked, names


def saved(make, folder, i=0, **changes):
    """The directory of an adapter, whose numbers do not depend on its settings."""
    model = make(config=replace(CONFIG, **changes))
    moved = jax.tree.map(lambda x: x + 0.1 * i + 0.1, model.variables["randlora"])
    model.variables = {**model.variables, "randlora": moved}
    model.save_pretrained(folder)
    return folder


@each_kind
def test_another_alpha_under_a_name_that_was_there_is_another_program(kind, tmp_path):
    make, run = KINDS[kind]
    alphas = {"6": 6, "also 6": 6, "60": 60}
    files = {
        name: saved(make, tmp_path / name, i, randlora_alpha=alpha)
        for i, (name, alpha) in enumerate(alphas.items())
    }
    model = make()
    checked, names = jitted(model, run)
    outputs = {}
    for file in ("6", "also 6", "60", "6"):
        model.load_adapter(files[file], "served")
        model.set_adapter("served", inference_mode=True)
        outputs.setdefault(file, []).append(checked())
        model.set_adapter("default")
        model.delete_adapter("served")
    assert len(names) == 2  # one for each alpha
    np.testing.assert_array_equal(*outputs["6"])
    assert not np.allclose(outputs["6"][0], outputs["also 6"][0])
    assert not np.allclose(outputs["also 6"][0], outputs["60"][0], rtol=0.1)


@each_kind
def test_another_scale_is_another_program_once(kind, tmp_path):
    make, run = KINDS[kind]
    model = make()
    model.load_adapter(saved(make, tmp_path), "served")
    model.set_adapter("served", inference_mode=True)
    checked, names = jitted(model, run)
    once, frozen = checked(), model.split()[1]
    model.set_scale("served", 20.0)
    assert not np.allclose(checked(), once, rtol=0.1)
    with pytest.raises(ConfigError, match=r"'served': scale: expected 20.0, .*found 1.0"):
        run(model, {**model.variables, **frozen})
    with pytest.raises(ConfigError, match=r"'served': scale: expected 20.0, .*found 1.0"):
        model.variables = {**model.variables, **frozen}
    model.set_scale("served", 1.0)
    np.testing.assert_array_equal(checked(), once)
    model.variables = {**model.variables, **frozen}
    assert len(names) == 2


@each_kind
def test_other_bases_under_the_same_two_names_are_another_program(kind, tmp_path):
    """Their shapes and the collection of bases are the same."""
    make, run = KINDS[kind]
    drawn = "torch:bf16-24bit", "torch:bf16-8bit"
    files = [saved(make, tmp_path / source, projection_source=source) for source in drawn]
    model = make()
    checked, names = jitted(model, run)
    outputs = []
    for one, two in (files, files[::-1]):
        model.load_adapter(one, "one")
        model.load_adapter(two, "two")
        model.set_adapter("one", inference_mode=True)
        one_alone = checked()
        model.set_adapter(["one", "two"], inference_mode=True)
        outputs.append([one_alone, checked()])
        model.set_adapter("default")
        model.delete_adapter("one")
        model.delete_adapter("two")
    assert len(names) == 4
    assert not np.allclose(outputs[0][0], outputs[1][0], rtol=1e-2)
    np.testing.assert_allclose(outputs[0][1], outputs[1][1], rtol=1e-4, atol=1e-5)  # their sum


def test_another_dropout_under_a_name_that_was_there_is_another_program(tmp_path):
    files = [saved(linen_model, tmp_path / str(rate), randlora_dropout=rate) for rate in (0.0, 0.5)]
    model = linen_model()
    rngs = {"dropout": jax.random.key(0)}
    checked, names = jitted(model, lambda model, v: model.apply(v, X, rngs=rngs))
    outputs = []
    for file in files:
        model.load_adapter(file, "served", is_trainable=True)
        model.set_adapter("served")
        outputs.append(checked())
        model.set_adapter("default")
        model.delete_adapter("served")
    assert len(names) == 2 and not np.allclose(*outputs)


def test_rows_find_their_adapters_after_these_changed_places(tmp_path):
    model = linen_model()
    for i, name in enumerate("ab"):
        model.load_adapter(saved(linen_model, tmp_path / name, i), name)
    model.delete_adapter("default")
    model.set_adapter(["a", "b"], inference_mode=True)
    run = jax.jit(lambda v, rows: model.apply(v, X, adapter_names=rows))
    names = ["a", "b", "a", "b", "__base__"]
    expected = model(X, adapter_names=names)
    for _ in range(2):
        found = run(model.variables, model.rows(names))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        model.delete_adapter("a")  # and comes back behind b
        model.load_adapter(tmp_path / "a", "a")
        model.set_adapter(["a", "b"], inference_mode=True)


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
