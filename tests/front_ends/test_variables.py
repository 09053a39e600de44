"""Variables that lack something, or hold what is not the model's, in linen and params pytrees."""

import copy
import dataclasses
import pickle
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from flax.serialization import from_bytes, to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
CONFIG = RandLoraConfig(
    r=4, randlora_alpha=8, target_modules=["proj"], modules_to_save=["head"], init_weights=False
)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(6, name="proj")(x)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="proj")(x))
        return nn.Dense(3, name="head")(x)


def variables_of(module):
    return module.init(jax.random.key(0), X)


def linen(module=None):
    module = module or Net()
    return get_peft_model(module.bind(variables_of(module)), CONFIG, rngs=jax.random.key(1))


def pytree():
    params = variables_of(Net())["params"]
    return get_peft_model(params, CONFIG, views={".*": "i o"}, rngs=jax.random.key(1))


KINDS = {
    "linen": (linen, lambda model, variables: model.apply(variables, X)),
    "pytree": (
        pytree,
        lambda model, variables: Net().apply({"params": model.merged(variables)}, X),
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def without(tree, *path):
    """`tree` without what lies at `path`."""
    first, *rest = path
    if not rest:
        return {key: value for key, value in tree.items() if key != first}
    return {**tree, first: without(tree[first], *rest)}


def replaced(tree, value, *path):
    """`tree` with another value at `path`."""
    first, *rest = path
    inner = replaced(tree.get(first, {}), value, *rest) if rest else value
    return {**tree, first: inner}


@each_kind
def test_whole_variables_run_without_a_word(kind):
    make, run = KINDS[kind]
    model = make()
    trained, frozen = model.split()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(model, model.variables)
        np.testing.assert_array_equal(run(model, {**frozen, "randlora": trained}), expected)
        np.testing.assert_array_equal(run(model, freeze(model.variables)), expected)
        model.variables = freeze(model.variables)
        np.testing.assert_array_equal(run(model, model.variables), expected)


@each_kind
def test_without_trained_leaves_the_base_model_runs_and_that_is_said(kind):
    make, run = KINDS[kind]
    model = make()
    frozen = model.split()[1]
    base = Net().apply({"params": frozen["params"]}, X)
    with pytest.warns(UserWarning, match=r"no collection 'randlora'.*without.*'default'") as caught:
        found = run(model, frozen)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(found, base, rtol=1e-6)
    with pytest.warns(UserWarning, match="no collection 'randlora'"):
        run(model, {"params": frozen["params"]})
    with warnings.catch_warnings(), model.disable_adapter():
        warnings.simplefilter("error")  # here it is meant
        np.testing.assert_allclose(run(model, frozen), base, rtol=1e-6)
        np.testing.assert_allclose(run(model, {"params": frozen["params"]}), base, rtol=1e-6)


@each_kind
def test_a_lost_frozen_adapter_is_said_too(kind):
    make, run = KINDS[kind]
    model = make()
    model.set_adapter("default", inference_mode=True)
    with pytest.warns(UserWarning, match="no collection 'randlora_frozen'"):
        run(model, without(model.variables, "randlora_frozen"))


TREE = ("randlora", "default", "proj")
FAULTS = {
    "no bases": (lambda v: without(v, "randlora_bases"), "'randlora_bases'.*no such collection"),
    "empty bases": (lambda v: {**v, "randlora_bases": {}}, "'randlora_bases'.*found none"),
    "no params": (lambda v: without(v, "params"), "'params' among them, found 'randlora"),
    "params alone": (lambda v: v["params"], "'params' among them, found 'head', 'proj'"),
    "trained alone": (lambda v: v["randlora"], "'params' among them, found 'default'"),
    "None": (lambda v: None, "'params' among them, found None"),
    "a list": (lambda v: {**v, "randlora": [1]}, "'randlora': expected a dict"),
    "a leaf": (lambda v: {**v, "randlora": {"default": 1}}, "'randlora': expected a dict"),
    "another adapter": (
        lambda v: {**v, "randlora": {"other": v["randlora"]["default"]}},
        "no adapter named 'other'.*has 'default'",
    ),
    "no adapter's tree": (lambda v: {**v, "randlora": {"default": {}}}, "expected .*found none"),
    "no gamma": (
        lambda v: without(v, *TREE, "randlora_gamma"),
        "'proj.randlora_gamma'.*found none",
    ),
    "another leaf": (lambda v: replaced(v, X, *TREE, "more"), "'proj.more': expected none"),
    "another layer": (
        lambda v: replaced(v, v["randlora"]["default"]["proj"], "randlora", "default", "new"),
        r"'new.randlora_\w+': expected none",
    ),
    "misshapen": (
        lambda v: replaced(v, jnp.zeros((4, 3)), *TREE, "randlora_lambda"),
        r"'proj.randlora_lambda': expected of shape \(4, 2\), found of shape \(4, 3\)",
    ),
    "misshapen whole": (
        lambda v: replaced(v, jnp.zeros(4), "randlora", "default", "head", "bias"),
        r"'head.bias': expected of shape \(3,\)",
    ),
    "narrow bases": (
        lambda v: {**v, "randlora_bases": cut(v["randlora_bases"])},
        "have shapes .* needs",
    ),
    "restored bases": (
        lambda v: {**v, "randlora_bases": {k: p._asdict() for k, p in v["randlora_bases"].items()}},
        "as a dict, not as the BasisPair",
    ),
    "no specs": (lambda v: without(v, "randlora_specs"), "'randlora_specs'.*found none: without"),
    "restored specs": (
        lambda v: {**v, "randlora_specs": {"default": None}},
        "'randlora_specs': expected what model.variables has there, found {'default': None}",
    ),
    "specs of others": (
        lambda v: {**v, "randlora_specs": {"other": v["randlora_specs"]["default"]}},
        "'randlora_specs'.*of adapter 'default', found 'other'",
    ),
    "another scale": (
        lambda v: {**v, "randlora_specs": specs_with(v, scale=2.0)},
        "'default': scale: expected 1.0, as the model has it, found 2.0",
    ),
}


def specs_with(variables, **changes):
    """What the variables say of their one adapter, changed."""
    known = variables["randlora_specs"]["default"]
    changed = dataclasses.replace(known.spec, **changes)
    return {"default": dataclasses.replace(known, spec=changed)}


def cut(bases):
    return {name: pair._replace(A=pair.A[:, :-1]) for name, pair in bases.items()}


@each_kind
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(kind, fault):
    make, run = KINDS[kind]
    model = make()
    break_, said = FAULTS[fault]
    broken = break_(model.variables)
    with pytest.raises(ConfigError, match=said):
        run(model, broken)
    with pytest.raises(ConfigError, match=said):
        jax.jit(lambda variables: run(model, variables))(broken)


def test_a_fault_is_named_where_whole_leaves_have_no_place():
    model = linen()
    with pytest.raises(ConfigError, match=r"'params' lack 'head.bias'.*trains whole"):
        model.apply(without(model.variables, "params", "head", "bias"), X)
    other = pytree()
    with pytest.raises(ConfigError, match="params: expected a pytree as it was wrapped"):
        other.merged(without(other.variables, "params", "head", "bias"))


@each_kind
@pytest.mark.parametrize("lost", ["params", "randlora", "randlora_bases", "randlora_specs"])
def test_what_is_assigned_is_whole(kind, lost):
    make, run = KINDS[kind]
    model = make()
    expected = run(model, model.variables)
    with pytest.raises(ConfigError, match=f"'{lost}'" if lost != "params" else "'params' among"):
        model.variables = without(model.variables, lost)
    with pytest.raises(ConfigError, match="no adapter named 'other'"):
        model.variables = replaced(model.variables, {}, "randlora", "other")
    with pytest.raises(ConfigError, match="expected of shape"):
        model.variables = replaced(model.variables, jnp.zeros(3), *TREE, "randlora_gamma")
    np.testing.assert_array_equal(run(model, model.variables), expected)


def test_other_collections_of_the_base_are_not_lost_either():
    model = linen(Normed())
    with pytest.raises(ConfigError, match="lack the collections 'batch_stats'"):
        model.variables = without(model.variables, "batch_stats")


def test_merged_adapters_need_no_leaves():
    model = linen()
    expected = model(X)
    before = model.variables
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(model.apply(model.variables, X), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.apply(before, X), expected, rtol=1e-5, atol=1e-5)
        model.variables = model.variables
    model.unmerge_adapter()
    np.testing.assert_array_equal(model(X), expected)


@each_kind
def test_variables_from_before_a_merge_run_and_are_not_assigned(kind):
    make, run = KINDS[kind]
    model = make()
    before = model.variables
    expected = run(model, before)
    base = Net().apply({"params": before["params"]}, X)
    assert np.abs(expected - base).max() > 1e-2
    close = lambda found: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # noqa: E731
    model.merge_adapter()
    after = model.variables
    with pytest.raises(ConfigError, match=r"merged the adapters none, and .* this model 'default'"):
        model.variables = before
    twice = {**after, "randlora": before["randlora"]}
    with pytest.raises(ConfigError, match=r"expected none, .*would be twice"):
        model.variables = twice
    with pytest.raises(ConfigError, match=r"expected none, .*would be twice"):
        run(model, twice)
    with pytest.warns(UserWarning, match="without the adapters 'default'"):
        run(model, {**before, "randlora": {}})
    close(run(model, before))
    model.variables = after
    close(run(model, model.variables))
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match=r"merged the adapters 'default', and .* this model none"):
        model.variables = after
    close(run(model, after))
    np.testing.assert_array_equal(run(model, model.variables), expected)


@each_kind
def test_so_it_is_where_what_is_merged_is_not_active(kind):
    make, run = KINDS[kind]
    model = make()
    model.add_adapter("other", dataclasses.replace(CONFIG, modules_to_save=None, init_weights=True))
    model.set_adapter("other")
    before = model.variables
    model.merge_adapter(["default"])
    expected = run(model, model.variables)
    assert np.abs(expected - run(model, before)).max() > 1e-2
    with pytest.raises(ConfigError, match="merged the adapters none"):
        model.variables = before
    model.variables = model.variables
    np.testing.assert_array_equal(run(model, model.variables), expected)


def test_an_unbound_or_empty_module_is_refused():
    with pytest.raises(ConfigError, match=r"pass module.bind\(variables\)"):
        get_peft_model(Net(), CONFIG)
    for variables in ({}, variables_of(Net())["params"]):
        with pytest.raises(ConfigError, match="expected 'params' among them"):
            get_peft_model(Net().bind(variables), CONFIG)


@pytest.mark.torch
def test_a_hugging_face_model_takes_its_collections_alike():
    from transformers import BertConfig, FlaxBertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 31}
    base = FlaxBertModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16))
    config = RandLoraConfig(r=4, target_modules=["query"])
    model, ids = get_peft_model(base, config), np.arange(8)[None]
    with pytest.warns(UserWarning, match="no collection 'randlora'"):
        model(ids, params=model.split()[1])
    with pytest.raises(ConfigError, match=r"'randlora_bases'.*no such collection"):
        model(ids, params=without(model.params, "randlora_bases"))
    with pytest.raises(ConfigError, match="'params' among them, found 'embeddings'"):
        model(ids, params=base.params)
    with pytest.raises(ConfigError, match="lack the collections 'randlora'"):
        model.params = model.split()[1]
    for nothing in (None, 3, "params"):
        with pytest.raises(ConfigError, match="variables: expected a dict of collections"):
            model.params = nothing
    with pytest.raises(ConfigError, match="'params': expected a dict, found 5"):
        model(ids, params={**model.params, "params": 5})
    with pytest.raises(ConfigError, match=r"'randlora_specs'.*found none: without"):
        model(ids, params=without(model.params, "randlora_specs"))
    before = model.params
    model.merge_adapter()
    with pytest.raises(ConfigError, match="have merged the adapters none"):
        model.params = before


def test_files_of_variables_hold_arrays_alone_and_are_restored_into_the_models():
    model = linen()
    again = from_bytes(model.variables, to_bytes(model.variables))
    assert jax.tree.structure(again) == jax.tree.structure(model.variables)
    np.testing.assert_array_equal(model.apply(again, X), model(X))
    # flatten_dict, as masks for optimizers are made, keeps all but empty collections
    flat = unflatten_dict(flatten_dict(model.variables))
    np.testing.assert_array_equal(model.apply(flat, X), model(X))
    copied = pickle.loads(pickle.dumps(model.variables))
    model.variables = copied
    np.testing.assert_array_equal(model.apply(copied, X), model(X))


@each_kind
def test_an_adapter_left_out_of_its_collection_is_said(kind):
    make, run = KINDS[kind]
    model = make()
    with pytest.warns(UserWarning, match=r"nothing of them.*without.*'default'"):
        run(model, {**model.variables, "randlora": {}})


@pytest.mark.parametrize("params", [None, 3, {}, {"proj": {"bias": X}}, "head"], ids=repr)
def test_params_must_have_the_kernels_that_are_adapted(params):
    model = linen()
    with pytest.raises(ConfigError, match=r"variables: 'params'.*(expected a dict|lack)"):
        model.apply({**model.variables, "params": params}, X)


@each_kind
@pytest.mark.parametrize("held", [(), [1], {"default": ()}], ids=repr)
def test_collections_of_adapters_hold_trees(kind, held):
    make, run = KINDS[kind]
    model = make()
    for collection in ("randlora", "randlora_frozen"):
        with pytest.raises(ConfigError, match=f"{collection}': expected a dict of trees"):
            run(model, {**model.variables, collection: held})


@each_kind
@pytest.mark.parametrize("inference", [False, True])
def test_variables_that_were_donated_can_be_given_back(kind, inference):
    make, run = KINDS[kind]
    model = make()
    model.set_adapter("default", inference_mode=inference)
    expected = np.array(run(model, model.variables))
    step = jax.jit(lambda variables: jax.tree.map(lambda x: x + 0, variables), donate_argnums=0)
    model.variables = step(model.variables)
    np.testing.assert_allclose(run(model, model.variables), expected, rtol=1e-5, atol=1e-5)
    assert set(model.delta_weights()) == {"proj"}


@each_kind
def test_what_trains_can_be_donated_alone(kind):
    """A module trained whole begins as the base's, in arrays of its own."""
    make, run = KINDS[kind]
    model = make()
    trained, frozen = model.split()
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0.1, tree), donate_argnums=0)
    run(model, {**frozen, "randlora": step(trained)})
    with model.disable_adapter():
        run(model, frozen)


def test_what_is_assigned_of_a_frozen_adapter_counts():
    model = linen()
    model.set_adapter("default", inference_mode=True)
    variables = model.variables
    moved = jax.tree.map(lambda x: x + 0.1, variables["randlora_frozen"])
    variables = {**variables, "randlora_frozen": moved}
    model.variables = variables
    np.testing.assert_array_equal(model(X), model.apply(variables, X))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Own:
    """A node of a pytree of the user's own."""

    kernel: jax.Array


def test_a_wrapped_pytree_of_nodes_of_ones_own_can_be_copied():
    config = RandLoraConfig(r=4, target_modules=["proj"], init_weights=False)
    params = {"proj": Own(jnp.asarray(X))}
    model = get_peft_model(params, config, views={"proj": "i o"}, rngs=jax.random.key(1))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = model.merged(model.variables)["proj"].kernel
    for made in copies:
        np.testing.assert_array_equal(made.merged(made.variables)["proj"].kernel, expected)


def test_frozen_variables_are_no_params_to_wrap():
    for frozen in (linen().split()[1], pytree().split()[1]):
        with pytest.raises(ConfigError, match="wrapped already"):
            get_peft_model(frozen, CONFIG, views={".*kernel": "i o"})
