"""Models of shapes alone of linen, Hugging Face, params pytrees and qwix; filled, they run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from randlora_jax import (
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    get_peft_model,
)

CONFIG = RandLoraConfig(r=3, randlora_alpha=6, target_modules="all-linear")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
TOKENS = np.arange(8)[None]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.relu(nn.Dense(6, name="up")(x)))


def params():
    return Net().init(jax.random.key(0), X)["params"]


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bert(do_init):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=8, intermediate_size=64, **sizes)
    return transformers.FlaxBertModel(config, _do_init=do_init)


def abstract_bert():
    model = bert(True)
    model.params = shapes(model.params)
    return model


# (the model, the same of shapes alone, what both are wrapped with)
MODELS = {
    "linen": lambda: (
        Net().bind({"params": params()}),
        Net().bind({"params": jax.eval_shape(params)}),
        {},
    ),
    "linen with a sample": lambda: (
        Net().bind({"params": params()}),
        Net().bind({"params": jax.eval_shape(params)}),
        {"sample_inputs": (X,)},
    ),
    "pytree": lambda: (params(), jax.eval_shape(params), {"views": {"up|down": "i o"}}),
    "hugging face": lambda: (bert(True), bert(False), {}),
    "hugging face with shapes": lambda: (bert(True), abstract_bert(), {}),
}


KINDS = [pytest.param(x, marks=pytest.mark.torch) if "face" in x else x for x in MODELS]


def run(model, variables=None):
    variables = model.variables if variables is None else variables
    if hasattr(model, "merged"):
        return model.merged(variables)["up"]["kernel"]
    if hasattr(model, "config"):
        return model(TOKENS, params=variables).last_hidden_state
    return model.apply(variables, X)


def called_as_is(model):
    """By a call without variables, where a model has one."""
    return model(TOKENS).last_hidden_state if hasattr(model, "config") else run(model)


def moved(model):
    trained, frozen = model.split()
    model.variables = {**frozen, "randlora": jax.tree.map(lambda x: x + 0.1, trained)}
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_shapes_and_once_filled_the_numbers(kind, tmp_path):
    base, empty, rules = MODELS[kind]()
    real = moved(get_peft_model(base, CONFIG, **rules))
    abstract = get_peft_model(empty, CONFIG, **rules)
    leaves = jax.tree.leaves(abstract.variables)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert shapes(abstract.variables) == shapes(real.variables)
    assert abstract.memory() == real.memory() and abstract.memory().total > 0
    assert str(abstract.coverage()) == str(real.coverage())
    assert abstract.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    out = jax.eval_shape(lambda variables: run(abstract, variables), abstract.variables)
    assert out.shape == run(real).shape

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "whole", real.variables)
    with ocp.StandardCheckpointer() as checkpointer:
        abstract.variables = checkpointer.restore(tmp_path / "whole", abstract.variables)
    np.testing.assert_array_equal(called_as_is(abstract), called_as_is(real))
    abstract.merge_adapter()
    abstract.unmerge_adapter()
    np.testing.assert_array_equal(run(abstract), run(real))
    real.save_pretrained(tmp_path / "real")
    abstract.save_pretrained(tmp_path / "abstract")
    files = [
        (tmp_path / x / "adapter_model.safetensors").read_bytes() for x in ("real", "abstract")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_before_names_what_is_not_filled_yet(kind, tmp_path):
    base, empty, rules = MODELS[kind]()
    real = moved(get_peft_model(base, CONFIG, **rules))
    abstract = get_peft_model(empty, CONFIG, **rules)
    for call in (
        lambda: abstract.save_pretrained(tmp_path),
        abstract.delta_weights,
        abstract.merge_adapter,
        lambda: abstract.merge_and_unload(dequantize=True),
    ):
        with pytest.raises(
            ConfigError, match=r"this wrapped model is abstract.*model\.variables ="
        ):
            call()
    with pytest.raises(ConfigError, match=r"'params\..*' is abstract.*eval_shape.*variables ="):
        called_as_is(abstract)
    abstract.variables = {**abstract.variables, "params": real.variables["params"]}
    with pytest.raises(ConfigError, match=r"'randlora\..*(lambda|gamma)' is abstract"):
        called_as_is(abstract)
    abstract.variables = {**abstract.variables, "randlora": real.variables["randlora"]}
    np.testing.assert_array_equal(called_as_is(abstract), called_as_is(real))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_on_a_model_that_was_filled(kind):
    base, empty, rules = MODELS[kind]()
    real = get_peft_model(base, CONFIG, **rules)
    abstract = get_peft_model(empty, CONFIG, **rules)
    abstract.variables = {**abstract.variables, "params": real.variables["params"]}
    abstract.delete_adapter("default")
    abstract.add_adapter("default", CONFIG)
    np.testing.assert_array_equal(called_as_is(abstract), called_as_is(real))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_into_it_and_it_is_handed_back(kind, tmp_path):
    base, empty, rules = MODELS[kind]()
    real = moved(get_peft_model(base, CONFIG, **rules))
    real.save_pretrained(tmp_path)
    abstract = RandLoraModel.from_pretrained(empty, tmp_path, **rules)
    with pytest.raises(ConfigError, match="this wrapped model is abstract"):
        abstract.merge_adapter()
    abstract.variables = {**abstract.variables, "params": real.variables["params"]}
    np.testing.assert_array_equal(called_as_is(abstract), called_as_is(real))


@pytest.mark.torch
def test_hugging_face_models_that_hold_no_params_say_where_they_are():
    real, empty = get_peft_model(bert(True), CONFIG), bert(False)
    abstract = get_peft_model(empty, CONFIG)
    assert abstract.unload() is empty
    abstract = get_peft_model(empty, CONFIG)
    moved(real)
    abstract.params = real.params
    out = abstract(TOKENS).last_hidden_state
    abstract.merge_adapter()
    with pytest.raises(ConfigError, match=r"_do_init=False.*model\.params\['params'\]"):
        abstract.merge_and_unload()
    found = empty(TOKENS, params=abstract.params["params"]).last_hidden_state
    np.testing.assert_allclose(found, out, atol=1e-5)


def test_shapes_that_say_where_they_will_lie_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = lambda x: PartitionSpec("data" if x.ndim == 2 else None)  # noqa: E731
    lying = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))),
        jax.eval_shape(params),
    )
    model = get_peft_model(Net().bind({"params": lying}), CONFIG)
    for leaf in jax.tree.leaves(model.split()[0]):
        assert leaf.sharding == NamedSharding(mesh, PartitionSpec())


def qwix_models(front_end):
    """A quantised model, and the same of shapes alone."""
    qwix = pytest.importorskip("qwix")
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="nf4", tile_size=2)
    provider = qwix.PtqProvider([rule])
    if front_end == "nnx":

        def made():
            rngs = nnx.Rngs(0)
            net = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs))
            return qwix.quantize_model(net, provider, X)

        return made(), nnx.eval_shape(made), {}
    module = qwix.quantize_model(Net(), provider)
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    numbers = {"params": qwix.quantize_params(params(), variables["params"])}
    return module.bind(numbers), module.bind(variables), {"sample_inputs": (X,)}


@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_quantised_models_of_shapes_alone(front_end, tmp_path):
    base, empty, rules = qwix_models(front_end)
    real = get_peft_model(base, CONFIG, **rules)
    abstract = get_peft_model(empty, CONFIG, **rules)
    assert abstract.memory() == real.memory()
    assert abstract.memory().base == 2 * 48 / 2 + 4 * 2 * 48 / 2 + 4 * 14
    assert str(abstract.coverage()) == str(real.coverage())
    assert abstract.explain(64) == real.explain(64) and "uint4" in real.explain(64)
    with pytest.raises(ConfigError, match="this wrapped model is abstract"):
        abstract.merge_and_unload(dequantize=True)
    with pytest.raises(ConfigError, match="is abstract, a ShapeDtypeStruct"):
        abstract(X)
    if front_end == "nnx":
        assert nnx.eval_shape(lambda model, x: model(x), abstract, X).shape == (5, 8)
        nnx.update(abstract, nnx.state(real))
    else:
        shape = jax.eval_shape(lambda variables: abstract.apply(variables, X), abstract.variables)
        assert shape.shape == (5, 8)
        abstract.variables = real.variables
    np.testing.assert_array_equal(abstract(X), real(X))
    merged = [model.merge_and_unload(dequantize=True)(X) for model in (abstract, real)]
    np.testing.assert_array_equal(*merged)


class Held(nnx.Module):
    def __init__(self, hold):
        qwix = pytest.importorskip("qwix")
        numbers = jax.random.normal(jax.random.key(0), (8, 6))
        self.weights = hold(qwix.quantize(numbers, "int8", channelwise_axes=[1]))

    def __call__(self, x):
        import qwix

        return qwix.dot_general(x, self.weights.get_raw_value(), (((1,), (0,)), ((), ())))


def test_quantised_arrays_of_a_module_of_ones_own():
    rules = {"layer_types": {Held: LayerType(KernelLayout("i o"), leaf="weights")}}
    real = get_peft_model(nnx.Sequential(Held(nnx.Param)), CONFIG, **rules)
    empty = nnx.eval_shape(lambda: nnx.Sequential(Held(nnx.Param)))
    abstract = get_peft_model(empty, CONFIG, **rules)
    assert abstract.memory() == real.memory()
    with pytest.raises(ConfigError, match=r"randlora_bases.*is abstract"):
        abstract(X)
    nnx.update(abstract, nnx.state(real, nnx.PathContains("randlora_bases")))
    with pytest.raises(ConfigError, match=r"'.*weights\.qvalue' is abstract"):
        abstract(X)
    nnx.update(abstract, nnx.state(real))
    np.testing.assert_array_equal(abstract(X), real(X))
    bare = nnx.eval_shape(lambda: nnx.Sequential(Held(lambda x: x)))
    with pytest.raises(ConfigError, match=r"'layers\.0\.weights' is a quantised.*nnx\.Param"):
        get_peft_model(bare, CONFIG, **rules)
