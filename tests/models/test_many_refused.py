"""Many adapters at once: what is refused, with what to do, and changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from many_nets import CONFIGS, IDS, NAMES, Net, adapted, by_row, move, same_rows, stacked

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(are saved by their paths|PEFT cannot open)")


def refused(act, match):
    with pytest.raises(ConfigError, match=match):
        act()


@pytest.mark.parametrize("in_stacks", [False, True])
def test_what_is_no_row_is_refused(in_stacks, each):
    model = stacked() if in_stacks else adapted()
    slots = model._registry.slot_count
    for wrong, match in {
        "too few": (["a"] * 3, "called with 4 rows .* has 3"),
        "none": ([], "called with 4 rows .* has 0"),
        "unknown": (["x"] * 4, "no adapter named 'x'"),
        "no names": ([None] * 4, "no adapter named None"),
        "numbers": ([0, 1, 2, 3], "no adapter named 0"),
        "a string": ("abcd", "expected one name for each row"),
        "a generator": ((name for name in NAMES), "expected one name for each row"),
        "a dict": (dict.fromkeys(NAMES), "expected one name for each row"),
        "a set": (set(NAMES), "expected one name for each row"),
        "an object": (object(), "expected one name for each row"),
        "floats": (np.zeros(4), "integer array"),
        "truths": (np.ones(4, bool), "integer array"),
        "words": (np.array(NAMES), "integer array"),
        "two axes": (jnp.zeros((4, 1), int), "integer array"),
        "too large": (jnp.array([0, 1, slots, 0]), f"slots from 0 to {slots - 1}, found"),
        "negative": (np.array([0, -1, 0, 0]), "found .-1."),
        "too few slots": (jnp.zeros(3, int), "called with 4 rows .* has 3"),
        "scales": (model.rows(NAMES, [1] * 4)._replace(scale=np.ones(3)), "expected .4,. finite"),
        "no scale": (model.rows(NAMES, [1] * 4)._replace(scale=None), "expected .4,. finite"),
    }.values():
        refused(lambda wrong=wrong: model(IDS, adapter_names=wrong), match)
    for wrong in ([1, 2], ["x"] * 4, 5.0, object(), [np.nan] * 4, [1e300] * 4):
        refused(lambda wrong=wrong: model.rows(NAMES, wrong), "scale: expected 4 finite numbers")
    assert by_row(model, IDS[:0], model.rows([])).shape == (0, 5, 3)
    model.disable_adapter_layers()
    refused(lambda: model(IDS, adapter_names=NAMES), "enable_adapter_layers")
    model.enable_adapter_layers()
    same_rows(by_row(model, IDS, model.rows(tuple(NAMES))), each, NAMES)
    if in_stacks:
        unknown = by_row(model, IDS, jnp.array([slots, 0, -1, 2**31 - 1]))
        assert np.isnan(unknown[np.array([0, 2, 3])]).all() and np.isfinite(unknown[1]).all()
    else:
        refused(lambda: model(IDS, adapter_names=jnp.int32(1)), r"needs stack_adapters\(\)")
        model.merge_adapter()
        refused(lambda: model(IDS, adapter_names=NAMES), "merged into the base")
        refused(model.stack_adapters, "merged into the base")


def test_dropout_in_training_is_refused_by_row_and_left_behind_by_stacks(each):
    config = RandLoraConfig(r=3, target_modules=["up"], randlora_dropout=0.5)
    model = get_peft_model(Net(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    move(model, "default")
    refused(lambda: model(IDS, adapter_names=["default"] * 4), r"training mode.*model\.eval\(\)")
    model.eval()
    expected = by_row(model, IDS)
    same_rows(
        by_row(model, IDS, model.rows(["default"] * 4)), {"default": expected}, ["default"] * 4
    )
    model.train()
    model.stack_adapters()
    same_rows(
        by_row(model, IDS, model.rows(["default"] * 4)), {"default": expected}, ["default"] * 4
    )
    assert model.peft_config["default"].randlora_dropout == 0.5


def test_what_does_not_fit_a_stack_is_refused_and_changes_nothing(each, saved, tmp_path):
    model = stacked(4, parts=2)
    model.add_weighted_adapter(["a"], [1.0], "mix")

    def fresh(**config):
        config = RandLoraConfig(**{"r": 3, "target_modules": ["up"]} | config)
        return lambda: model.add_adapter("new", config, trainable=False)

    up = RandLoraConfig(r=3, target_modules=["up"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (saved / "b").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-3])
    before, said = jax.tree.map(np.asarray, nnx.state(model)), repr(model)
    for act, match in (
        (lambda: model.add_adapter("new", up), "not trained"),
        (lambda: model.load_adapter(saved / "b", "new", is_trainable=True), "not trained"),
        (fresh(target_modules=["head"]), "trains whole 'head'"),
        (fresh(modules_to_save=["blocks.0.up"], target_modules=["down"]), "blocks.0.up"),
        (fresh(r=5), "has the bases jax-0-dense-r5"),
        (fresh(projection_prng_key=1), "must share it"),
        (lambda: model.load_adapter(saved / "a", "mix"), "already here"),
        (lambda: model.load_adapter(saved / "a", "a"), "already here"),
        (lambda: model.load_adapter(saved / "a", "__base__"), "PEFT's word for no adapter"),
        (lambda: model.load_adapter(damaged, "new"), "damaged|truncated|JSON|expected"),
        (lambda: model.hotswap_adapter(damaged, "a"), "damaged|truncated|JSON|expected"),
        (lambda: model.hotswap_adapter(saved / "none", "a"), "none"),
        (lambda: model.hotswap_adapter(saved / "c", "d"), "other bases"),
        (lambda: model.hotswap_adapter(saved / "b", "a"), "part of 'mix'"),
        (lambda: model.hotswap_adapter(saved / "b", "mix"), "'mix' combines 'a'"),
        (lambda: model.hotswap_adapter(saved / "b", "x"), "no adapter named 'x'"),
        (lambda: model.hotswap_adapter(saved / "b", ["a"]), "no adapter named"),
        (lambda: model.merge_adapter(), "lie in stacks"),
        (lambda: model.stack_adapters(1), "room for the 3 adapters"),
        (lambda: model.stack_adapters(0), "capacity: expected a positive integer"),
        (lambda: model.stack_adapters(2.0), "capacity: expected a positive integer"),
        (lambda: model.stack_adapters(parts=0), "parts: expected a positive integer"),
        *(
            (lambda wrong=wrong: model.set_adapter(wrong), match)
            for wrong, match in (
                (5, "no adapter named 5"),
                (None, "no adapter named None"),
                ("__base__", "no adapter named '__base__'"),
                (["a", "b"], "add_weighted_adapter"),
                ([], "expected one adapter"),
            )
        ),
        *(
            (
                lambda act=act, wrong=wrong: act(wrong),
                "no adapter named|expected one name|found none",
            )
            for act in (
                model.delete_adapter,
                lambda name: model.set_scale(name, 1.0),
                model.set_rows,
            )
            for wrong in (5, None, ["x"], "x", [])
        ),
        *(
            (lambda act=act, wrong=wrong: act(wrong), "scale: expected a finite number")
            for act in (model.scale_layer, lambda scale: model.set_scale("a", scale))
            for wrong in (None, "x", np.nan, np.inf, 1j)
        ),
        *(
            (lambda wrong=wrong: model.add_weighted_adapter(*wrong), match)
            for wrong, match in (
                ((["a", "d", "b"], [1, 1, 1], "new"), "trained modules|room for 2"),
                ((["a", "b"], [1, 1], "new"), "'b': modules trained whole"),
                ((["a"], [1], "a"), "already here"),
                ((["a"], [1], "mix"), "already here"),
                ((["a"], ["x"], "new"), "finite number"),
                ((["a"], 5, "new"), "expected a list"),
                ((["a"], [1, 2], "new"), "one for each of 1"),
                ((["a", "a"], [1, 2], "new"), "one for each of 1"),
                (([], [], "new"), "expected a list"),
                ((["x"], [1], "new"), "no adapter named 'x'"),
                ((["mix"], [1], "new"), "'mix' combines"),
                ((["a"], [1], "__base__"), "PEFT's word"),
                ((["a"], [1], "new", "svd"), "expected 'linear'"),
            )
        ),
    ):
        with pytest.raises(ValueError, match=match):
            act()
    model.set_rows(NAMES)
    refused(lambda: model.delete_adapter("b"), "set_rows")
    model.set_adapter("a")
    for x, now in zip(*map(jax.tree.leaves, (before, nnx.state(model))), strict=True):
        np.testing.assert_array_equal(x, now)
    assert repr(model) == said
    refused(fresh(), "all 4 slots of the bases jax-0-dense-r3 are taken")
    same_rows(by_row(model, IDS, model.rows(NAMES)), each, NAMES)


def test_what_must_be_in_stacks_says_so(each):
    model = adapted()
    for act in (
        lambda: model.set_rows(NAMES),
        lambda: model.hotswap_adapter("x", "a"),
        lambda: model.add_weighted_adapter(["a"], [1], "new"),
    ):
        refused(act, r"stack_adapters\(\)")
    model.set_adapter(["a", "c"])
    refused(model.stack_adapters, "'a', 'c' are active together")
    for name in CONFIGS:
        model.delete_adapter(name)
    refused(model.stack_adapters, "no adapter yet")
