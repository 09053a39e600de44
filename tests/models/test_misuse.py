"""What users get wrong is answered in words that help, for every kind of model alike."""

import dataclasses
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import (
    AdapterFileError,
    ConfigError,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["proj"])
RANDOM = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["proj"], init_weights=False)


class Net(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.proj(x))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.Dense(6, name="proj")(x))


def linen(change=lambda tree: tree):
    return LinenNet().bind(change(LinenNet().init(jax.random.key(0), X)))


def pytree(change=lambda tree: tree):
    return change(LinenNet().init(jax.random.key(0), X)["params"])


def in_nnx(change):
    model = Net()
    for _, module in nnx.iter_modules(model):
        for variable in vars(module).values():
            if isinstance(variable, nnx.Variable):
                variable.set_raw_value(change(variable.get_raw_value()))
    return model


def hugging_face(change=lambda tree: tree):
    from transformers import BertConfig, FlaxBertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 31}
    model = FlaxBertModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16))
    model.params = change(model.params)
    return model


MAKERS = {
    "nnx": (Net, {}),
    "linen": (linen, {}),
    "pytree": (pytree, {"views": {".*": "i o"}}),
    "hf": (hugging_face, {}),
}
TARGETS = {"hf": ["query"]}
KINDS = ["nnx", "linen", "pytree", pytest.param("hf", marks=pytest.mark.torch)]


def config_for(kind, **more):
    return RandLoraConfig(r=4, randlora_alpha=8, target_modules=TARGETS.get(kind, ["proj"]), **more)


def wrap(kind, *args, **more):
    make, said = MAKERS[kind]
    return get_peft_model(make(), *(args or [config_for(kind)]), **{**said, **more})


# The configuration.


class OfPeft:
    """As PEFT's configurations look."""

    peft_type = "RANDLORA"

    def to_dict(self):
        return {"peft_type": "RANDLORA", "r": 4, "target_modules": {"proj"}}


@pytest.mark.parametrize(
    ("found", "remedy"),
    [
        ({"r": 4}, r"RandLoraConfig\(\*\*settings\)"),
        (None, "Make one"),
        ("all-linear", "Make one"),
        (RandLoraConfig, "Make one"),
        (OfPeft(), r"from_dict\(config.to_dict\(\)\)"),
    ],
    ids=["dict", "None", "str", "class", "PEFT's"],
)
def test_a_config_of_another_kind_is_refused(found, remedy):
    model = get_peft_model(Net(), CONFIG)
    for call in (lambda: get_peft_model(Net(), found), lambda: model.add_adapter("b", found)):
        with pytest.raises(ConfigError, match=f"expected a RandLoraConfig.*{remedy}"):
            call()
    assert model.active_adapters == ["default"]


def test_the_remedies_work():
    with pytest.raises(ConfigError) as caught:
        get_peft_model(Net(), OfPeft())
    remedy = re.search(r"dataclasses\.replace\(.*'\)", str(caught.value))[0]
    known = {"dataclasses": dataclasses, "RandLoraConfig": RandLoraConfig, "config": OfPeft()}
    model = get_peft_model(Net(), eval(remedy, known))
    made = model.peft_config["default"]
    assert (made.r, made.target_modules) == (4, ("proj",))


# Names of adapters.


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a.b", "__base__", " a", None, 3])
def test_impossible_names_are_refused_wherever_they_enter(name, tmp_path):
    model = get_peft_model(Net(), CONFIG)
    model.save_pretrained(tmp_path)
    for call in (
        lambda: get_peft_model(Net(), CONFIG, name),
        lambda: model.add_adapter(name, CONFIG),
        lambda: model.load_adapter(tmp_path, name),
        lambda: RandLoraModel.from_pretrained(Net(), tmp_path, name),
    ):
        with pytest.raises(ConfigError, match="adapter name: expected a plain name"):
            call()
    for call in (model.set_adapter, model.delete_adapter, model.merge_adapter, model.delta_weights):
        if name not in (None, "") or call != model.merge_adapter:  # these stand for the active ones
            with pytest.raises(ConfigError, match="no adapter named"):
                call(name)
    assert list(model.peft_config) == ["default"]


def test_one_name_is_taken_where_several_may_stand():
    model = get_peft_model(Net(), RANDOM, rngs=nnx.Rngs(0))
    before = model(X)
    model.merge_adapter("default")
    merged = model.merge_and_unload(adapter_names="default")
    np.testing.assert_allclose(merged(X), before, rtol=1e-5, atol=1e-5)


# What is said when wrapping.


@pytest.mark.parametrize("found", ["data", None, 3, [("data",)], {"data"}], ids=repr)
def test_token_axes_are_a_sequence(found):
    with pytest.raises(ConfigError, match=r"token_axes: expected a sequence.*\['data'\]"):
        get_peft_model(Net(), CONFIG, token_axes=found)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("views", "i o"),
        ("views", [("proj", "i o")]),
        ("views", {1: "i o"}),
        ("views", {"proj(": "i o"}),
        ("views", {"proj": ["i", "o"]}),
        ("names", "model.proj"),
        ("names", {"proj(": "proj"}),
        ("names", {"proj": []}),
        ("names", {"proj": 3}),
        ("layer_types", nnx.Linear),
        ("layer_types", {nnx.Linear: "i o"}),
    ],
    ids=repr,
)
def test_rules_are_dicts_of_the_right_kinds(said, found):
    with pytest.raises(ConfigError, match=f"^{said}: "):
        get_peft_model(Net(), CONFIG, **{said: found})


@pytest.mark.parametrize(
    "name",
    ["", ".proj", "proj.", "a..proj", r"model.\2", "model.{}", "a.{x}"],
)
def test_a_names_rule_gives_a_module_path(name):
    with pytest.raises(TargetError, match="names rule 'proj'"):
        get_peft_model(Net(), CONFIG, names={"proj": name})


def test_slashes_in_a_names_rule_become_dots():
    model = get_peft_model(Net(), CONFIG, names={"(.*)": r"model/\1"})
    assert "model.proj" in model.targeted_module_names


@pytest.mark.parametrize("rngs", [0, "key", {"params": 0}])
def test_what_cannot_be_drawn_from_is_refused(rngs, tmp_path):
    with pytest.raises(ConfigError, match=r"rngs: expected nnx.Rngs\(seed\)"):
        get_peft_model(Net(), RANDOM, rngs=rngs)
    get_peft_model(Net(), CONFIG).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"rngs: expected nnx.Rngs\(seed\)"):
        RandLoraModel.from_pretrained(Net(), tmp_path, rngs=rngs)


class Held(Net):
    """Biases by other names, as tunix's Qwen 2 holds them."""

    def __init__(self):
        self.proj = nnx.Linear(8, 6, use_bias=False, rngs=nnx.Rngs(0))
        self.proj_bias = nnx.Param(jnp.ones(6))
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.proj(x) + self.proj_bias)


@pytest.mark.parametrize(
    ("bias", "more", "said"),
    [
        (
            "randlora_only",
            {},
            "'randlora_only' finds nothing to train: no adapted layer .*'b'.*'proj_bias'",
        ),
        (
            "all",
            {"modules_to_save": ["head"]},
            "'all' finds nothing to train: no module .*'proj_bias'",
        ),
        ("all", {}, None),
        ("none", {}, None),
    ],
)
def test_a_bias_setting_that_finds_no_bias_is_said(bias, more, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(Held(), config_for("nnx", bias=bias, **more))
    found = [str(warning.message) for warning in caught]
    assert len(found) == (said is not None) and all(re.search(said, text) for text in found)


# Saving.


def test_a_file_in_the_way_is_said_before_anything_is_written(tmp_path):
    model = get_peft_model(Net(), CONFIG)
    model.add_adapter("task", CONFIG)
    (tmp_path / "task").write_text("mine")
    for directory in (tmp_path, tmp_path / "task", tmp_path / "task" / "deeper"):
        with pytest.raises(AdapterFileError, match="task is a file"):
            model.save_pretrained(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_saving_needs_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in ("", None, 3):
        with pytest.raises(AdapterFileError, match="expected a directory to save to"):
            get_peft_model(Net(), CONFIG).save_pretrained(directory)
    assert not list(tmp_path.iterdir())


# Wrapped already.


WAYS = r"add_adapter.*load_adapter.*unload\(\).*merge_and_unload\(\)"
TWICE = f"wrapped already.*{WAYS}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_is_not_wrapped_again(kind, tmp_path):
    model = wrap(kind)
    model.save_pretrained(tmp_path)
    for call in (
        lambda: get_peft_model(model, config_for(kind)),
        lambda: RandLoraModel.from_pretrained(model, tmp_path, "other"),
    ):
        with pytest.raises(ConfigError, match=TWICE):
            call()
    assert model.active_adapters == ["default"]
    again = get_peft_model(model.unload(), config_for(kind), **MAKERS[kind][1])
    assert again.active_adapters == ["default"]


def test_an_nnx_model_whose_layers_were_replaced_is_not_wrapped_again():
    net = Net()
    model = get_peft_model(net, RANDOM, rngs=nnx.Rngs(0))
    before = model(X)
    for base in (net, nnx.Sequential(net)):
        with pytest.raises(ConfigError, match=TWICE):
            get_peft_model(base, CONFIG)
    np.testing.assert_array_equal(model(X), before)
    get_peft_model(model.unload(), CONFIG)


def test_variables_of_a_wrapped_model_are_not_wrapped():
    model = wrap("linen")
    for variables in (model.variables, {**model.split()[1]}):
        with pytest.raises(ConfigError, match=f"hold 'randlora.*{WAYS}"):
            get_peft_model(LinenNet().bind(variables), CONFIG)
    with model._adapting(model.variables) as joined:
        pass
    for base, said in ((LinenNet().bind(joined), {}), (joined["params"], {"views": {".*": "i o"}})):
        with pytest.raises(ConfigError, match=r"hold 'params\.proj\.randlora"):
            get_peft_model(base, CONFIG, **said)


# Models without arrays, or with NumPy's.


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("kind", ["linen", "pytree"])
def test_an_abstract_tree_can_be_wrapped_within(kind):
    make, said = MAKERS[kind]

    def variables(tree):
        return get_peft_model(make(lambda _: tree), CONFIG, **said).variables

    tree = pytree() if kind == "pytree" else LinenNet().init(jax.random.key(0), X)
    shapes = jax.eval_shape(variables, abstract(tree))
    assert jax.tree.map(jnp.shape, wrap(kind).variables) == jax.tree.map(lambda x: x.shape, shapes)


def test_an_abstract_nnx_model_can_be_wrapped_within():
    made = nnx.eval_shape(lambda: get_peft_model(Net(), CONFIG))
    real = get_peft_model(Net(), CONFIG)
    assert nnx.state(made)["model"]["proj"]["randlora_lambda"]["default"]["kernel"].shape == (4, 2)
    shapes = lambda model: [x.shape for x in jax.tree.leaves(nnx.state(model))]  # noqa: E731
    assert shapes(made) == shapes(real)


def outputs(kind, model):
    if kind == "hf":
        return model(np.arange(8)[None]).last_hidden_state
    return model.merged(model.variables)["proj"]["kernel"] if kind == "pytree" else model(X)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_params_are_as_good_as_jaxs(kind, tmp_path):
    make, said = MAKERS[kind]
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)  # noqa: E731
    base = in_nnx(np.asarray) if kind == "nnx" else make(to_numpy)
    config, rngs = config_for(kind, init_weights=False), {"rngs": jax.random.key(1)}
    model = get_peft_model(base, config, **said, **rngs)
    same = get_peft_model(make(), config, **said, **rngs)
    expected = np.asarray(outputs(kind, same))
    np.testing.assert_array_equal(outputs(kind, model), expected)
    if kind != "nnx":  # and when they come back from a checkpoint
        model.variables = to_numpy(model.variables)
        np.testing.assert_array_equal(outputs(kind, model), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    np.testing.assert_array_equal(outputs(kind, model), expected)
    model.save_pretrained(tmp_path)


# A model that is one layer.


ROOTS = {
    "nnx": (lambda: nnx.Linear(8, 6, rngs=nnx.Rngs(0)), {}),
    "linen": (lambda: nn.Dense(6).bind(nn.Dense(6).init(jax.random.key(0), X)), {}),
    "pytree": (lambda: {"kernel": jnp.ones((8, 6))}, {"views": {"": "i o"}}),
}


@pytest.mark.parametrize("kind", ROOTS)
def test_a_model_that_is_a_layer_is_said_and_takes_a_name(kind):
    make, said = ROOTS[kind]
    for targets in ("all-linear", ["proj"], ".*"):
        config = RandLoraConfig(r=4, target_modules=targets)
        with pytest.raises(TargetError, match=r"model itself is a layer.*Sequential.*names="):
            get_peft_model(make(), config, **said)
    model = get_peft_model(make(), RANDOM, names={"": "proj"}, rngs=jax.random.key(1), **said)
    assert model.targeted_module_names == ["proj"]
    (delta,) = model.delta_weights().values()
    merged = model.merge_and_unload()
    found = merged["kernel"] if kind == "pytree" else merged(X) - make()(X)
    expected = 1 + delta.T if kind == "pytree" else X @ delta.T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_one_array_is_no_model():
    with pytest.raises(ConfigError, match="one array without a name"):
        get_peft_model(jnp.ones((8, 6)), CONFIG, views={".*": "i o"})
