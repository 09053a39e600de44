"""Many adapters in stacks: their life compiles nothing, and what a model says of them is right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from many_nets import CONFIGS, IDS, NAMES, Net, adapted, alone, by_row, move, same_rows, stacked

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*are saved by their paths in the JAX model"),
    pytest.mark.filterwarnings("ignore:base_model_name_or_path is unknown"),
    pytest.mark.filterwarnings("ignore:PEFT cannot open these adapters in one PyTorch model"),
]


def counted():
    """A compiled function of a model, and how often it was traced."""
    traces = []

    @nnx.jit
    def run(model, ids, rows=None):
        traces.append(1)
        return model(ids, adapter_names=rows)

    return run, traces


def test_one_program_for_any_assignment_of_64_adapters_to_16_rows():
    config = RandLoraConfig(r=4, target_modules=["up"])
    model = get_peft_model(Net(nnx.Rngs(0)), config, adapter_name="a0")
    for i in range(1, 64):
        model.add_adapter(f"a{i}", config)
    names = [f"a{i}" for i in range(64)]
    model.stack_adapters()
    state = nnx.state(model, nnx.PathContains("randlora_lambda"))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    run, traces = counted()
    ids = jnp.broadcast_to(IDS[:1], (16, 5))
    alike = {n: np.asarray(run(model, ids, model.rows([n] * 16)))[0] for n in names}
    rng = np.random.default_rng(0)
    for _ in range(40):
        chosen = list(rng.choice([*names, "__base__"], 16))
        out = np.asarray(run(model, ids, model.rows(chosen)))
        for name, row in zip(chosen, out, strict=True):
            if name != "__base__":
                assert np.abs(row - alike[name]).max() <= 1e-6 * np.abs(out).max()
    assert len({out.tobytes() for out in alike.values()}) == 64
    assert len(traces) == 1


def test_a_hundred_swaps_compile_nothing(each, saved):
    """Loaded, deleted, swapped, chosen, scaled: the program of the first call runs them all."""
    model, (run, traces) = stacked(), counted()
    run(model, IDS, model.rows(NAMES))
    rng = np.random.default_rng(0)
    holds = dict(zip("abcd", "abcd", strict=True))  # which adapter stands under which name
    kinds = {name: model.peft_config[name].r for name in "abcd"}
    for step in range(100):
        name = str(rng.choice(sorted(holds)))
        what = ["load", "delete", "hotswap", "set_adapter", "scale"][step % 5]
        if what == "load":
            source = str(rng.choice(list("abcd")))
            if sum(kinds[s] == kinds[source] for s in holds.values()) < 5:
                model.load_adapter(saved / source, f"n{step}")
                holds[f"n{step}"] = source
        elif what == "delete" and len(holds) > 2:
            if model.active_adapters == [name]:
                model.set_adapter(next(other for other in holds if other != name))
            model.delete_adapter(name)
            del holds[name]
        elif what == "hotswap":
            alike = [s for s in "abcd" if kinds[s] == kinds[holds[name]]]
            holds[name] = str(rng.choice(alike))
            model.hotswap_adapter(saved / holds[name], name)
        elif what == "set_adapter":
            model.set_adapter(name)
        else:
            model.set_scale(name, 0.0)
            model.set_scale(name, 1.0)
        names = [str(n) for n in rng.choice([*holds, "__base__"], 4)]
        out = run(model, IDS, model.rows(names))
        same_rows(out, each, [holds.get(n, n) for n in names])
        assert set(model.peft_config) == set(holds)  # and no list of before came back
    assert len(traces) == 1


def test_what_rows_take_in_calls_that_name_none_is_data(each):
    model, (run, traces) = stacked(), counted()
    for names in (NAMES, NAMES[::-1], ["d"] * 4):
        model.set_rows(names)
        same_rows(run(model, IDS), each, names)
    assert len(traces) == 1
    for name in "abcd":  # all rows alike is another program, and one of its own
        model.set_adapter(name)
        same_rows(run(model, IDS), each, [name] * 4)
        model.set_rows([name] * 4)
        same_rows(run(model, IDS), each, [name] * 4)
    assert len(traces) == 2
    same_rows(run(model, IDS, model.rows(NAMES)), each, NAMES)
    with model.disable_adapter():
        same_rows(run(model, IDS), each, ["__base__"] * 4)
        with pytest.raises(ConfigError, match="off"):
            model(IDS, adapter_names=NAMES)
        # a program of before cannot raise: adapters that are off are in no slot
        same_rows(run(model, IDS, jnp.arange(4)), each, ["__base__"] * 4)
    assert len(traces) == 3
    model.stack_adapters(6)
    same_rows(run(model, IDS), each, ["d"] * 4)
    assert len(traces) == 4


def test_a_partial_that_keeps_its_model_sees_what_is_swapped(each, saved):
    model = stacked()
    run = nnx.cached_partial(
        nnx.jit(lambda model, ids, rows: model(ids, adapter_names=rows)), model
    )
    same_rows(run(IDS, model.rows(["a"] * 4)), each, ["a"] * 4)
    model.hotswap_adapter(saved / "b", "a")
    same_rows(run(IDS, model.rows(["a"] * 4)), each, ["b"] * 4)
    model.load_adapter(saved / "d", "new")
    same_rows(run(IDS, model.rows(["new", "a", "c", "b"])), each, ["d", "b", "c", "b"])


def test_names_in_a_compiled_function_are_refused_where_their_slots_may_change(each):
    run = nnx.jit(lambda model, ids: model(ids, adapter_names=NAMES))
    same_rows(run(adapted(), IDS), each, NAMES)
    with pytest.raises(ConfigError, match=r"rows = model\.rows\(names\)"):
        run(stacked(), IDS)


def test_copies_of_a_model_are_told_apart(each, saved):
    model = stacked()
    shared = nnx.merge(*nnx.split(model))  # of the same Variables
    shared.load_adapter(saved / "a", "new")
    same_rows(by_row(model, IDS, model.rows(["new"] * 4)), each, ["a"] * 4)
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    copy.hotswap_adapter(saved / "b", "new")
    same_rows(by_row(copy, IDS, copy.rows(["new"] * 4)), each, ["b"] * 4)
    same_rows(by_row(model, IDS, model.rows(["a"] * 4)), each, ["a"] * 4)
    for act in (
        lambda: model(IDS, adapter_names=["new"] * 4),
        lambda: model.set_rows(["new"] * 4),
        lambda: model.set_scale("a", 2.0),
        lambda: model.load_adapter(saved / "a", "more"),
        lambda: model.delete_adapter("a"),
        lambda: model.save_pretrained(saved / "not"),
        lambda: model.delta_weights("new"),
        lambda: model.stack_adapters(),
    ):
        with pytest.raises(ConfigError, match=r"'new' is not in slot \d of this copy"):
            act()
    assert not (saved / "not").exists()
    copy.stack_adapters()
    copy.delete_adapter("new")
    copy.load_adapter(saved / "d", "other")
    assert "new" in model.peft_config and "other" not in model.peft_config


def test_a_clone_chooses_for_itself(each):
    """Before: the original merged, switched off and said what the clone had chosen."""
    model = stacked()
    model.set_scale("b", 0.5)
    clone = nnx.clone(model)
    clone.set_adapter("b")
    clone.set_scale("b", 1.0)
    assert model.active_adapters == ["a"] and clone.active_adapters == ["b"]
    model.set_scale("d", 1.0)  # which says all of its table anew
    same_rows(by_row(model, IDS), each, ["a"] * 4)
    same_rows(by_row(clone, IDS), each, ["b"] * 4)
    model.set_rows(NAMES)
    clone.disable_adapter_layers()
    model.set_scale("b", 1.0)
    clone.set_scale("a", 1.0)
    same_rows(by_row(model, IDS), each, NAMES)
    same_rows(by_row(clone, IDS), each, ["__base__"] * 4)
    with pytest.raises(ConfigError, match="set_rows"):
        model.delete_adapter("c")
    clone.enable_adapter_layers()
    same_rows(by_row(clone, IDS), each, ["b"] * 4)
    assert model.active_adapters == ["a"] and clone.active_adapters == ["b"]
    clone.delete_adapter("c")
    with pytest.raises(ConfigError, match="hold adapters that were deleted in another"):
        model.set_adapter("a")
    same_rows(by_row(model, IDS), each, NAMES)  # as before it was refused
    same_rows(nnx.clone(model).merge_and_unload()(IDS), each, ["a"] * 4, 3e-6)


def test_a_state_that_was_restored_is_known_by_name(each):
    """Of a model whose adapters were stacked alike, in this process or another."""
    model, other = stacked(), adapted()
    model.set_adapter("b")
    other.stack_adapters(5, parts=2)
    nnx.update(other, jax.tree.map(np.asarray, nnx.state(model)))
    assert other.active_adapters == ["b"]
    same_rows(by_row(other, IDS), each, ["b"] * 4)
    same_rows(other(IDS, adapter_names=NAMES), each, NAMES, 3e-6)
    other.set_adapter("d")
    same_rows(by_row(other, IDS), each, ["d"] * 4)
    other.stack_adapters(6)
    same_rows(by_row(other, IDS, other.rows(NAMES)), each, NAMES)


def test_rows_follow_the_base_model_as_it_is_now():
    """What an adapter did not train whole is the base's, in stacks as one by one."""
    model, apart = stacked(), adapted()
    for each in (model, apart):
        head, embedding = each.model.head.base_layer.kernel, each.model.emb.base_layer.embedding
        head[...] *= -1.5
        embedding[...] *= 2.0
    each = alone(apart, IDS)
    for names in (NAMES, ["a", "b", "c", "d"]):
        same_rows(by_row(model, IDS, model.rows(names)), each, names)
    for name in CONFIGS:
        model.set_adapter(name)
        same_rows(by_row(model, IDS), each, [name] * 4)
        same_rows(nnx.clone(model).merge_and_unload()(IDS), each, [name] * 4, 3e-6)


def test_rows_made_before_an_adapter_went_mean_what_they_did(each):
    """Before: the rows of another one, where adapters are kept one by one."""
    model = adapted()
    names = ["b", "__base__", "d", "c"]
    rows = model.rows(names)
    with pytest.warns(UserWarning, match="'a' was active"):
        model.delete_adapter("a")
    same_rows(by_row(model, IDS, rows), each, names)
    model.add_adapter("e", CONFIGS["a"])
    move(model, "e", seed=9)
    same_rows(by_row(model, IDS, rows), each, names)
    model.delete_adapter("b")
    same_rows(by_row(model, IDS, rows), each, ["__base__", "__base__", "d", "c"])
    np.testing.assert_array_equal(model.rows(["c", "d"]), rows[np.array([3, 2])])
    model.stack_adapters()
    same_rows(by_row(model, IDS, model.rows(["d"] * 4)), each, ["d"] * 4)


def test_memory_is_lambda_and_gamma_times_room_and_the_bases_once():
    model = get_peft_model(Net(nnx.Rngs(0)), CONFIGS["b"], adapter_name="n0")
    one = model.memory()
    for i in range(1, 7):
        model.add_adapter(f"n{i}", CONFIGS["b"])
    assert model.memory().adapters == 7 * one.adapters
    model.stack_adapters()
    assert model.memory() == one._replace(adapters=7 * one.adapters, gradients=0, adamw=0)
    model.stack_adapters(16)
    assert model.memory() == one._replace(adapters=16 * one.adapters, gradients=0, adamw=0)
    held = jax.tree.leaves(nnx.state(model))
    # parts, weights, stamps, scales of each slot and the base's; the chosen one, the active one
    table = 4 * 17 * 4 + 4 + 4
    whole = 16 * len(nnx.to_flat_state(nnx.state(model, nnx.PathContains("randlora_own"))))
    assert sum(x.nbytes for x in held) == model.memory().total + table + whole
    model.delete_adapter("n3")
    assert model.memory().adapters == 16 * one.adapters


def test_a_combination_is_the_weighted_sum_of_deltas():
    configs = {
        "a": CONFIGS["a"],
        "d": CONFIGS["d"],
        "e": RandLoraConfig(r=2, target_modules=["up"]),
    }
    model = adapted(configs=configs)
    deltas = {name: model.delta_weights(name) for name in configs}
    model.stack_adapters(4, parts=3)
    weights = {"a": 0.5, "d": -2.0, "e": 1.5}

    def expected(weights):
        plain = Net(nnx.Rngs(0))
        for name, weight in weights.items():
            for path, delta in deltas[name].items():
                _, i, layer = path.split(".")
                kernel = getattr(plain.blocks[int(i)], layer).kernel
                kernel[...] += weight * delta.T
        return nnx.jit(lambda net: net(IDS))(plain)

    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    each = {"sum": expected(weights), "a": expected({"a": 1}), "__base__": expected({})}
    names = ["a", "sum", "__base__", "sum"]
    same_rows(by_row(model, IDS, model.rows(names)), each, names, 3e-6)
    model.set_adapter("sum")
    same_rows(by_row(model, IDS), each, ["sum"] * 4, 3e-6)
    assert model.active_adapters == ["sum"]
    model.scale_layer(0.5)
    half = {"sum": expected({name: weight / 2 for name, weight in weights.items()})}
    same_rows(by_row(model, IDS), half, ["sum"] * 4, 3e-6)
    model.set_scale("sum", 1.0)
    model.set_scale("a", 3.0)  # of a part
    same_rows(by_row(model, IDS), {"sum": expected(weights | {"a": 1.5})}, ["sum"] * 4, 3e-6)
    model.set_scale("a", 1.0)
    model.stack_adapters(5, parts=3)
    same_rows(by_row(model, IDS), each, ["sum"] * 4, 3e-6)
    with pytest.raises(ConfigError, match="delete it first"):
        model.delete_adapter("a")
    with pytest.warns(UserWarning, match="'sum' was active; now 'a' is"):
        model.delete_adapter("sum")
    same_rows(by_row(model, IDS), each, ["a"] * 4, 3e-6)


@pytest.mark.torch
@pytest.mark.parametrize("in_stacks", [False, True])
def test_scale_is_what_pefts_layers_make_of_it(in_stacks):
    """PEFT's LoRA layer (RandLoRA's has neither): set_scale is on top of alpha / r, scale_layer
    multiplies that of the active adapters."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear

    layer = LoraLinear(
        torch.nn.Linear(4, 4), "a", r=4, config=LoraConfig(r=4, lora_alpha=12), lora_alpha=12
    )
    layer.update_layer("b", r=4, lora_alpha=8, config=LoraConfig(r=4, lora_alpha=8))
    model = adapted(
        configs={
            "a": RandLoraConfig(r=4, randlora_alpha=12, target_modules=["up"]),
            "b": RandLoraConfig(r=4, randlora_alpha=8, target_modules=["up"]),
        }
    )
    if in_stacks:
        model.stack_adapters()
    one = {name: model.delta_weights(name)["blocks.0.up"] for name in "ab"}
    plain = {"a": 3.0, "b": 2.0}

    def same():
        for name, delta in one.items():
            found = model.delta_weights(name)["blocks.0.up"]
            expected = layer.scaling[name] / plain[name] * delta
            largest = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)

    same()
    for act in (
        lambda m: m.set_scale("a", 0.5),
        lambda m: m.scale_layer(3.0),
        lambda m: m.scale_layer(1),
        lambda m: m.set_adapter("b"),
        lambda m: m.scale_layer(0.25),
        lambda m: m.set_scale("a", 2.0),
        lambda m: m.set_scale("b", 0.0),
        lambda m: m.scale_layer(2.0),
    ):
        act(model)
        act(layer)
        same()
    model.set_adapter("a")
    rows = model.rows(["a", "b", "__base__", "a"], scale=[1.0, 5.0, 5.0, -0.5])
    found = np.asarray(by_row(model, IDS, rows))
    for strength, row in ((1.0, 0), (0.0, 1), (0.0, 2), (-0.5, 3)):
        model.set_scale("a", 2.0 * strength)
        expected = np.asarray(by_row(model, IDS))
        assert np.abs(found[row] - expected[row]).max() <= 1e-6 * np.abs(expected).max()


def test_a_stacked_model_says_what_it_said_before(each, tmp_path):
    model, stack = adapted(), stacked()
    assert stack.peft_config == model.peft_config
    assert repr(stack) == repr(model).replace("active, trained", "active")
    assert stack.get_nb_trainable_parameters() == (0, model.get_nb_trainable_parameters()[1])
    untrained = {n: {**s, "trains": False} for n, s in model.randlora_settings().items()}
    assert stack.randlora_settings() == untrained
    json.dumps(stack.randlora_settings())
    stack.check_randlora_settings(model.randlora_settings())
    assert str(stack.coverage()) == str(model.coverage())
    assert stack.targeted_module_names == model.targeted_module_names
    for name in CONFIGS:
        assert stack.explain(20, name) == model.explain(20, name)
        for layer, delta in model.delta_weights(name).items():
            np.testing.assert_array_equal(stack.delta_weights(name)[layer], delta)
    model.save_pretrained(tmp_path / "apart")
    stack.save_pretrained(tmp_path / "stacked")
    files = sorted(p.relative_to(tmp_path / "apart") for p in (tmp_path / "apart").rglob("*.*"))
    assert len(files) == 3 * len(CONFIGS)
    for file in files:
        ours = (tmp_path / "stacked" / file).read_bytes()
        if file.name != "adapter_config.json":
            assert ours == (tmp_path / "apart" / file).read_bytes()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_merged_and_unloaded_from_a_stack(name, each):
    model = stacked()
    model.set_adapter(name)
    same_rows(model.merge_and_unload(safe_merge=True)(IDS), each, [name] * 4, 3e-6)
    model = stacked()
    model.add_weighted_adapter(["a"], [1.0], "mix")
    with pytest.raises(ConfigError, match="'mix' combines 'a'"):
        model.merge_and_unload(adapter_names=["mix"])
    model.set_adapter("mix")
    same_rows(model.unload()(IDS), each, ["__base__"] * 4)


def test_deleting_all_and_drawing_bases_anew_leaves_the_room(each, saved):
    model, (run, traces) = stacked(), counted()
    run(model, IDS, model.rows(NAMES))
    with pytest.warns(UserWarning, match="was active"):
        for name in CONFIGS:
            model.delete_adapter(name)
    model.draw_bases()
    assert model.active_adapters == [] and "no adapter" in repr(model)
    for name in CONFIGS:
        model.load_adapter(saved / name, name)
    same_rows(run(model, IDS, model.rows(NAMES)), each, NAMES)
    assert model.active_adapters == ["a"] and len(traces) == 1
