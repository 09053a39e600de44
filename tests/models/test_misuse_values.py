"""Arguments of kinds that nobody meant, models in states that cannot do what is asked."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import (
    AdapterParam,
    ConfigError,
    Contraction,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)
from randlora_jax.layer_types import of_einsum

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["proj"])


class Net(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.proj(x))


def two():
    model = get_peft_model(Net(), CONFIG)
    model.add_adapter("b", CONFIG)
    return model


NO_FLAGS = [None, 1, "yes", np.ones(2), jax.random.key(0)]


@pytest.mark.parametrize("value", NO_FLAGS, ids=lambda value: type(value).__name__)
def test_flags_are_true_or_false(value, tmp_path):
    model = two()
    model.save_pretrained(tmp_path)
    for name, call in (
        ("trainable", lambda: model.add_adapter("c", CONFIG, trainable=value)),
        ("inference_mode", lambda: model.set_adapter("b", value)),
        ("safe_merge", lambda: model.merge_adapter(safe_merge=value)),
        ("safe_merge", lambda: model.merge_and_unload(value)),
        ("is_trainable", lambda: model.load_adapter(tmp_path, "c", value)),
        ("is_trainable", lambda: RandLoraModel.from_pretrained(Net(), tmp_path, "c", value)),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: expected True or False"):
            call()
    assert list(model.peft_config) == ["default", "b"] and model.active_adapters == ["default"]
    model.set_adapter("b", np.bool_(True))


@pytest.mark.parametrize("more", [{}, {"sparse": True}, {"projection_source": "torch:bf16-24bit"}])
def test_an_alpha_that_float32_has_no_room_for(more, tmp_path):
    """PEFT computes infinity with it."""
    big = RandLoraConfig(r=4, randlora_alpha=1e308, target_modules=["proj"], **more)
    message = r"randlora_alpha 1e\+308 and r 4: expected alpha / r within float32"
    with pytest.raises(ConfigError, match=message):
        get_peft_model(Net(), big)
    model = get_peft_model(Net(), RandLoraConfig(r=4, target_modules=["proj"], **more))
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("b", big)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"randlora_alpha": 1e308}))
    for call in (
        lambda: RandLoraModel.from_pretrained(Net(), tmp_path),
        lambda: model.load_adapter(tmp_path, "b"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert list(model.peft_config) == ["default"]
    least = RandLoraConfig(r=4, randlora_alpha=4e38, target_modules=["proj"], **more)
    assert np.isfinite(get_peft_model(Net(), least)(X)).all()  # lambda is zero


def test_names_of_adapters_may_come_in_an_array_and_twice():
    config = RandLoraConfig(r=4, target_modules=["proj"], init_weights=False)
    model = get_peft_model(Net(), config, rngs=nnx.Rngs(0))
    once = model(X)
    model.set_adapter(["default", "default"])
    np.testing.assert_array_equal(model(X), once)
    model.add_adapter("b", config, rngs=nnx.Rngs(1))
    model.merge_adapter(np.array(["default", "b"]))
    model.unmerge_adapter()
    for name in (np.array(None), jnp.array(1), np.ones(2), [["default"]], {"c": 1}):
        for call in (model.set_adapter, model.merge_adapter):
            with pytest.raises(ConfigError, match="no adapter named"):
                call(name)
    np.testing.assert_array_equal(model(X), once)


@pytest.mark.parametrize("apply", [None, 3, ["auto"], np.array(["auto", "auto"])], ids=repr)
def test_apply_is_one_of_three(apply):
    with pytest.raises(ConfigError, match="expected 'auto', 'factored' or 'merged'"):
        get_peft_model(Net(), CONFIG, apply=apply)


@pytest.mark.parametrize("tokens", [None, 0, -1, 2.5, "8", np.ones(2)], ids=repr)
def test_tokens_are_counted(tokens):
    with pytest.raises(ConfigError, match="tokens: expected a positive integer"):
        get_peft_model(Net(), CONFIG).explain(tokens)


@pytest.mark.parametrize("wanted", ["dropout", "params"])
def test_the_stream_that_is_drawn_from_is_enough_and_its_lack_is_named(wanted):
    """Of flax's own nnx.Dropout(rate, rngs=nnx.Rngs(dropout=0)) nothing else is asked, either."""
    more = {"randlora_dropout": 0.2} if wanted == "dropout" else {"init_weights": False}
    config = RandLoraConfig(r=4, target_modules=["proj", "head"], **more)
    other = "params" if wanted == "dropout" else "dropout"
    model = get_peft_model(Net(), config, rngs=nnx.Rngs(**{wanted: 0}))
    before = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    with pytest.raises(
        ConfigError, match=rf"{next(iter(more))}.* draws from the stream '{wanted}'"
    ):
        model.add_adapter("b", config, rngs=nnx.Rngs(**{other: 0}))
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == before
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", config, rngs=nnx.Rngs(0))
    model.set_adapter("b")
    assert model(jnp.ones((2, 8))).shape == (2, 3)


@pytest.mark.parametrize("rngs", [jnp.ones(3), jnp.ones((2, 2), jnp.uint32)], ids=repr)
def test_an_array_that_is_no_key_is_refused(rngs):
    config = RandLoraConfig(r=4, target_modules=["proj"], init_weights=False)
    with pytest.raises(ConfigError, match="rngs: expected"):
        get_peft_model(Net(), config, rngs=rngs)
    get_peft_model(Net(), config, rngs=jax.random.PRNGKey(0))  # a key of the old kind


@pytest.mark.parametrize("names", ["proj", {"proj": 3}, {3: "proj"}, {"(": "x"}], ids=repr)
def test_names_given_when_saving_are_rules(names, tmp_path):
    with pytest.raises(ConfigError, match=r"^names: "):
        get_peft_model(Net(), CONFIG).save_pretrained(tmp_path, names=names)
    assert not list(tmp_path.iterdir())


IO = KernelLayout("i o")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KernelLayout(None), "kernel layout None"),
        (lambda: LayerType("i o"), r"layout: expected a KernelLayout, such as KernelLayout\('i o'"),
        (lambda: LayerType(IO, "...i,io->...o"), "call: expected a Contraction"),
        (lambda: LayerType(IO, leaf=("w",)), "leaf: expected the name of an array"),
        (lambda: Contraction(3), "Contraction: expected an einsum"),
        (lambda: Contraction("bi,io"), "Contraction: expected an einsum"),
        (lambda: Contraction("bb,bo->o"), "each letter once"),
        (lambda: Contraction("bi,io->bk"), "Contraction: expected an einsum"),
        (lambda: LayerType(IO, Contraction("...d,dnh->...nh")), "'io' does not fit the call"),
        (lambda: LayerType(KernelLayout("o i"), Contraction("...i,io->...o")), "does not fit"),
        (lambda: LayerType(IO, Contraction("bti,io->bo")), "nothing else may be summed"),
        (lambda: LayerType(IO, Contraction("bi,io->")), "does not fit"),
        (lambda: of_einsum("bi"), "expected an einsum"),
    ],
)
def test_what_is_said_of_a_layer_must_make_sense(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_what_tells_of_a_type_gives_a_layer_type():
    with pytest.raises(ConfigError, match=r"layer_types: what tells of a Linear gave 'i o'"):
        get_peft_model(Net(), CONFIG, layer_types={nnx.Linear: lambda module: "i o"})


def test_a_model_without_adapters_has_none_to_save(tmp_path):
    model = get_peft_model(Net(), CONFIG)
    model.delete_adapter("default")
    with pytest.raises(ConfigError, match="no adapter to save"):
        model.save_pretrained(tmp_path)


def test_an_abstract_wrapped_model_has_no_numbers(tmp_path):
    model = nnx.eval_shape(lambda: get_peft_model(Net(), CONFIG))
    for call in (
        lambda: model.save_pretrained(tmp_path),
        model.delta_weights,
        model.merge_adapter,
        lambda: model(X),
    ):
        with pytest.raises(ConfigError, match=r"is abstract.*nnx.update"):
            call()
    real = get_peft_model(Net(), CONFIG)
    nnx.update(model, nnx.state(real))
    np.testing.assert_array_equal(model(X), real(X))
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("theirs", [2, 8])
def test_leaves_of_another_rank_are_named(theirs, tmp_path):
    model, other = (
        get_peft_model(Net(), replace(CONFIG, target_modules=["proj", "head"], r=r))
        for r in (4, theirs)
    )
    nnx.update(model, nnx.state(other, AdapterParam))
    for act in (
        lambda: model(X),
        lambda: nnx.jit(lambda model: model(X))(model),
        model.merge_adapter,
        model.delta_weights,
        model.stack_adapters,
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"'default' of '(proj|head)'.* with another r"):
            act()


def test_bases_of_before_a_wider_adapter_are_named_with_the_way_out():
    model = get_peft_model(Net(), replace(CONFIG, target_modules=["head"]))
    before = nnx.state(model)
    model.add_adapter("b", replace(CONFIG, init_weights=False), rngs=nnx.Rngs(1))
    model.set_adapter("b")
    expected = model(X)
    nnx.update(model, before)
    with pytest.raises(ConfigError, match=r"'proj' slices shared bases .*draw_bases\(\)"):
        model(X)
    model.draw_bases()
    np.testing.assert_array_equal(model(X), expected)


def test_a_model_that_could_not_be_wrapped_is_as_it_was():
    base = nnx.Sequential(nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0)))
    for config, said in (
        (RandLoraConfig(r=4, target_modules=["nope"]), {}),
        (RandLoraConfig(r=4, target_modules="all-linear", randlora_dropout=0.5), {}),
        (RandLoraConfig(r=4, target_modules="all-linear"), {"views": {"nope": "i o"}}),
    ):
        with pytest.raises((ConfigError, TargetError)):
            get_peft_model(base, config, **said)
        assert type(base.layers[0].lora.lora_a) is nnx.LoRAParam
        assert type(base.layers[0]) is nnx.LoRALinear


def test_numpy_arrays_that_an_update_puts_into_a_wrapped_model():
    config = RandLoraConfig(r=4, target_modules=["proj"], init_weights=False)
    model = get_peft_model(Net(), config, rngs=nnx.Rngs(0))
    expected = model(X)
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(model)))
    np.testing.assert_array_equal(model(X), expected)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), expected, rtol=1e-4)
    model.merge_adapter()
    np.testing.assert_allclose(model(X), expected, rtol=1e-4)
