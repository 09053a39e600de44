"""Rows of one batch with adapters of their own, in linen models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_rows import CONFIGS, IDS, NAMES, Net, Scanned, adapted, alone, assert_rows

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.models.slots import Chosen


@pytest.fixture(params=["one by one", "in stacks"])
def kept(request):
    return request.param


def prepared(kept, net=None, **rules):
    """A model, and what each of its adapters makes of the batch alone."""
    model, bound = adapted(net, **rules)
    each = alone(model, bound)
    if kept == "in stacks":
        model.stack_adapters(4)
    return model, each


def test_each_row_is_its_own_adapters(kept):
    model, each = prepared(kept)
    assert_rows(model(IDS, adapter_names=NAMES), NAMES, each)
    order = [3, 0, 4, 2, 1]
    turned = [NAMES[i] for i in order]
    found = model(IDS[jnp.array(order)], adapter_names=turned)
    np.testing.assert_allclose(found, model(IDS, adapter_names=NAMES)[jnp.array(order)], atol=1e-6)


@pytest.mark.parametrize("mistake", ["rows shifted by one", "no weight", "another's leaves"])
def test_known_mistakes_are_seen(mistake, monkeypatch):
    model, each = prepared("in stacks")
    of, leaves = Chosen.of.__func__, Chosen.leaves

    def wrong(cls, stack, table, rows):
        found = of(cls, stack, table, rows)
        if mistake == "no weight":
            return found._replace(weight=jnp.ones_like(found.weight))
        return Chosen(*(jnp.roll(x, 1, 0) for x in found))

    if mistake == "another's leaves":
        shifted = lambda self, stacked, base: leaves(self, jnp.roll(stacked, 1, 0), base)  # noqa: E731
        monkeypatch.setattr(Chosen, "leaves", shifted)
    else:
        monkeypatch.setattr(Chosen, "of", classmethod(wrong))
    with pytest.raises(AssertionError):
        assert_rows(model(IDS, adapter_names=NAMES), NAMES, each)


@pytest.mark.parametrize("wrap", ["remat", "jit"])
def test_under_transformations_of_blocks(wrap):
    model, each = prepared("in stacks", Net(wrap))
    names = list(reversed(NAMES))
    base = model(IDS, adapter_names=["__base__"] * len(NAMES))
    for some in (NAMES, names):  # nn.jit would keep what it compiled for the first
        found = model(IDS, adapter_names=some)
        # eagerly nn.jit has a program for each assignment, and each may round as it likes
        assert_rows(found, some, each, base if wrap == "remat" else found)


def test_an_inner_jit_compiles_an_assignment_once(compiled):
    """Called eagerly; with `jax.jit` around, one program is for all assignments."""
    configs = {"a": {"r": 3, "target_modules": ["up"]}, "b": {"r": 3, "target_modules": ["down"]}}
    model, bound = adapted(Net("jit"), configs)
    each, names = alone(model, bound), ["a", "b", "__base__", "a", "b"]
    model.stack_adapters(4)
    assignments = [names, names[::-1]]
    first = [model(IDS, adapter_names=some) for some in assignments]
    before = compiled()
    for some, out in zip(assignments, first, strict=True):
        np.testing.assert_array_equal(model(IDS, adapter_names=some), out)
    assert compiled() == before
    for some, out in zip(assignments, first, strict=True):
        assert_rows(out, some, each, out)
    model.set_scale("b", 0.0)  # the same slots, other strengths
    silent = model(IDS, adapter_names=names)
    assert_rows(silent, ["a", "__base__", "__base__", "a", "__base__"], each, silent)
    run = jax.jit(lambda variables, rows: model.apply(variables, IDS, adapter_names=rows))
    rows = [model.rows(some) for some in assignments]
    run(model.variables, rows[0])
    before = compiled()
    run(model.variables, rows[1])
    assert compiled() == before


@pytest.mark.parametrize(
    ("axis", "views", "kept"),
    [
        (0, "s i o", "one by one"),
        (0, "s i o", "in stacks"),
        (1, "i s o", "in stacks"),
        (-1, "i o s", "in stacks"),
    ],
)
def test_in_scanned_stacks_of_layers(axis, views, kept):
    configs = {**CONFIGS, "b": {"r": 3, "target_modules": ["up"]}}
    rules = {"views": {"blocks/(up|down)": views}}
    model, bound = adapted(Scanned(axis), configs, **rules)
    each = alone(model, bound)
    if kept == "in stacks":
        model.stack_adapters(3)  # as many as layers
    base = model(IDS, adapter_names=["__base__"] * len(NAMES))
    assert_rows(model(IDS, adapter_names=NAMES), NAMES, each, base)


def test_methods_rngs_and_mutable_collections():
    model, each = prepared("in stacks")
    found = model(IDS, adapter_names=NAMES, method="twice") / 2
    assert_rows(found, NAMES, each)
    rngs = {"noise": jax.random.key(0)}
    for mutable in (["state"], ["params"]):
        found, state = model(IDS, adapter_names=NAMES, mutable=mutable, rngs=rngs)
        assert_rows(found, NAMES, each)
        assert "randlora" not in str(state)


def test_any_assignment_and_any_change_run_one_program(tmp_path):
    model, bound = adapted()
    each = alone(model, bound)
    model.stack_adapters(4)
    model.save_pretrained(tmp_path)
    traces = []

    @jax.jit
    def run(variables, ids, rows):
        traces.append(1)
        return model.apply(variables, ids, adapter_names=rows)

    rng = np.random.default_rng(0)
    base = run(model.variables, IDS, model.rows(["__base__"] * 5))
    for _ in range(5):
        names = [str(name) for name in rng.choice([*CONFIGS, "__base__"], 5)]
        assert_rows(run(model.variables, IDS, model.rows(names)), names, each, base)
    for i in range(20):
        gone = f"d{i - 1}" if i else "b"
        model.delete_adapter(gone)
        model.load_adapter(tmp_path / "b", f"d{i}")
        each[f"d{i}"] = each["b"]
        names = ["a", f"d{i}", "__base__", f"d{i}", "c"]
        assert_rows(run(model.variables, IDS, model.rows(names)), names, each, base)
    model.set_scale("d19", 0.0)
    model.hotswap_adapter(tmp_path / "b", "d19")
    model.set_scale("d19", 1.0)
    model.set_rows(NAMES[1:2] * 5)
    assert_rows(run(model.variables, IDS, model.rows(["d19"] * 5)), ["d19"] * 5, each)
    assert len(traces) == 2  # set_rows made `chosen` an array (rows,), once
    scale = [1.0, 0.0, 0.5, 1.0, 1.0]
    found = run(model.variables, IDS, model.rows(["a", "c", "d19", "c", "a"], scale=scale))
    model.set_scale("d19", 0.5)
    model.set_adapter("d19")
    each["half"] = model(IDS)
    model.set_scale("c", 0.0)
    model.set_adapter("c")
    each["none"] = model(IDS)
    assert_rows(found, ["a", "none", "half", "c", "a"], each)


def test_one_adapter_for_all_rows_is_data_too():
    model, bound = adapted()
    each = alone(model, bound)
    model.stack_adapters(4)
    traces = []

    @jax.jit
    def run(variables):
        traces.append(1)
        return model.apply(variables, IDS)

    for name in CONFIGS:
        model.set_adapter(name)
        assert_rows(run(model.variables), [name] * 5, each)
    with model.disable_adapter():
        found = run(model.variables)
    assert_rows(found, ["__base__"] * 5, each, found)
    assert len(traces) == 1
    model.set_rows(NAMES)
    assert_rows(model(IDS), NAMES, each)
    assert_rows(model.apply(model.variables, IDS), NAMES, each)


def test_any_module_runs_by_row_under_vmap():
    model, each = prepared("in stacks")
    variables = model.variables
    one = lambda ids, slot: model.apply(variables, ids[None], adapter_names=slot)[0]  # noqa: E731
    found = jax.vmap(one)(IDS, model.rows(NAMES))
    expected = np.stack([each[name][i] for i, name in enumerate(NAMES)])
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_the_collections_of_stacks(tmp_path):
    model, each = prepared("in stacks")
    model.save_pretrained(tmp_path)
    trained, frozen = model.split()
    assert trained == {} and set(frozen["randlora_slots"]) == {
        "parts",
        "weights",
        "stamps",
        "chosen",
        "active",
        "scales",
    }
    stacks = frozen["randlora_frozen"]
    assert len(stacks) == 2
    dense = next(tree for tree in stacks.values() if "head" in tree)
    assert dense["block_0"]["up"]["randlora_lambda"].shape == (4, 3, 3)
    assert dense["head"]["kernel"].shape == (4, 8, 3)
    whole = {**frozen, "randlora": trained}
    model.variables = jax.tree.map(np.asarray, whole)  # as a checkpoint gives them back
    assert_rows(model(IDS, adapter_names=NAMES), NAMES, each)
    alike, _ = prepared("in stacks")  # as in another process
    alike.variables = jax.tree.map(np.asarray, whole)
    assert_rows(alike.apply(whole, IDS, adapter_names=NAMES), NAMES, each)
    name = next(iter(stacks))
    for lost, message in (
        ("randlora_slots", "randlora_slots"),
        ("randlora_frozen", "lack the stacks"),
        ("randlora_bases", "randlora_bases"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.apply({k: x for k, x in whole.items() if k != lost}, IDS, adapter_names=NAMES)
    cut = jax.tree.map(lambda x: x[..., :2], stacks[name])
    with pytest.raises(ConfigError, match="expected of shape"):
        model.apply({**whole, "randlora_frozen": {**stacks, name: cut}}, IDS)
    model.set_scale("a", 0.5)
    with pytest.raises(ConfigError, match="says otherwise"):
        model.variables = whole
    model.delete_adapter("b")
    model.load_adapter(tmp_path / "b", "b")  # of the same settings: what the variables hold runs
    assert_rows(model.apply(whole, IDS, adapter_names=["b"] * 5), ["b"] * 5, each)
    model.delete_adapter("b")
    model.load_adapter(tmp_path / "b", "d")  # in b's slot
    with pytest.raises(ConfigError, match="as they were before"):
        model.apply(whole, IDS, adapter_names=["d"] * 5)


def test_rows_follow_the_base_model_as_it_is_now():
    """What an adapter did not train whole is the base's of now; rows of one that went, too."""
    expected, kept_rows = None, None
    for stacked in (False, True):
        model, bound = adapted()
        if stacked:
            model.stack_adapters(4)
        variables = model.variables
        head = jax.tree.map(lambda x: x + 1.0, variables["params"]["head"])
        model.variables = {**variables, "params": {**variables["params"], "head": head}}
        if not stacked:
            plain = bound.unbind()[0].bind({"params": {**bound.variables["params"], "head": head}})
            expected = alone(model, plain)
            kept_rows = model.rows(NAMES)
            assert_rows(model(IDS, adapter_names=kept_rows), NAMES, expected)
            model.delete_adapter("a")
            there = [name if name != "a" else "__base__" for name in NAMES]
            assert_rows(model(IDS, adapter_names=kept_rows), there, expected)
            continue
        assert_rows(model(IDS, adapter_names=NAMES), NAMES, expected)
        for name in CONFIGS:
            model.set_adapter(name)
            assert_rows(model(IDS), [name] * 5, expected)


def test_what_is_wrong_is_told(kept):
    model, _ = prepared(kept)
    for names, message in (
        (NAMES[:4], "has 4: expected one name for each row"),
        ([*NAMES[:4], "d"], "no adapter named 'd'"),
        ("a", "expected one name for each row"),
        (jnp.array([0, 1, 2, 3, 99]), r"slots from 0 to \d, found \[99\]"),
        (jnp.zeros(5), "integer array"),
    ):
        with pytest.raises(ConfigError, match=message):
            model(IDS, adapter_names=names)
    model.disable_adapter_layers()
    with pytest.raises(ConfigError, match="are off"):
        model(IDS, adapter_names=NAMES)


def test_one_by_one_the_variables_have_to_hold_them_all():
    model, _ = prepared("one by one")
    with pytest.raises(ConfigError, match=r"lack 'a', 'b'.*stack_adapters"):
        model.apply(model.variables, IDS, adapter_names=NAMES)
    model.merge_adapter("c")
    with pytest.raises(ConfigError, match="merged"):
        model(IDS, adapter_names=NAMES)


def test_dropout_in_training():
    configs = {**CONFIGS, "b": {**CONFIGS["b"], "randlora_dropout": 0.5}}
    model, bound = adapted(configs=configs)
    each = alone(model, bound)
    assert_rows(model(IDS, adapter_names=NAMES), NAMES, each)
    rngs = {"dropout": jax.random.key(0)}
    with pytest.raises(ConfigError, match=r"'b' has dropout.*inference"):
        model(IDS, adapter_names=NAMES, rngs=rngs)
    model.stack_adapters()
    assert_rows(model(IDS, adapter_names=NAMES, rngs=rngs), NAMES, each)


def test_a_params_pytree_refuses():
    params = {"up": jnp.ones((4, 6))}
    config = RandLoraConfig(r=2, target_modules=["up"])
    model = get_peft_model(params, config, views={"up": "i o"})
    with pytest.raises(ConfigError, match="no row can have an adapter of its own"):
        model.stack_adapters()
