"""Rules that decide nothing are errors, whatever they match."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from randlora_jax import (
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)

CONFIG = RandLoraConfig(r=4, target_modules=["proj"], modules_to_save=["norm"])
DENSE = LayerType(KernelLayout("i o"))


class Mlp(nnx.Module):
    def __init__(self):
        self.gate, self.up = nnx.Param(jnp.ones((8, 6))), nnx.Param(jnp.ones((2, 8, 6)))


class Net(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(6, rngs=nnx.Rngs(1))
        self.mlp = Mlp()

    def __call__(self, x):
        return self.norm(self.proj(x)) + x @ self.mlp.gate[...]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"proj/bias": "i o"}, "no array that the rule 'proj/bias' matches is a kernel"),
        ({"mlp/gate": "i o", "mlp/up": "i o"}, "no array that the rule 'mlp/up' matches"),
        ({"proj": "s i o"}, "layer 'proj', array 'kernel': kernel layout 'sio' describes 3 axes"),
    ],
)
def test_a_view_is_of_a_kernel_that_has_its_axes(rules, words):
    with pytest.raises(ConfigError, match=words):
        get_peft_model(Net(), CONFIG, views=rules)


def test_names_are_of_modules_not_of_their_arrays():
    with pytest.raises(ConfigError, match=r"names: the rule 'proj/kernel' matches nothing"):
        get_peft_model(Net(), CONFIG, names={"proj/kernel": "model.proj"})
    rules = {"mlp/gate": "model.gate", "proj": "model.proj", "norm": "model.norm"}
    model = get_peft_model(Net(), CONFIG, names=rules, views={"mlp/gate": "i o"})
    assert model.targeted_module_names == ["model.proj"]


def test_names_given_when_saving_may_be_of_modules_trained_whole(tmp_path):
    model, rules = get_peft_model(Net(), CONFIG), {"proj": "model.proj", "norm": "model.norm"}
    model.save_pretrained(tmp_path, names=rules)
    again = RandLoraModel.from_pretrained(Net(), tmp_path, names=rules)
    assert again.targeted_module_names == ["model.proj"]
    with pytest.raises(ConfigError, match=r"names: the rule 'norm/scale' matches nothing"):
        model.save_pretrained(tmp_path, names={"norm/scale": "model.norm"})


def test_a_rule_given_when_saving_takes_the_place_of_one_with_its_very_key(tmp_path):
    model = get_peft_model(Net(), CONFIG, names={"(.*)": r"\1"})
    model.save_pretrained(tmp_path, names={"(.*)": r"model.\1"})
    again = RandLoraModel.from_pretrained(Net(), tmp_path, names={"(.*)": r"model.\1"})
    assert again.targeted_module_names == ["model.proj"]


@pytest.mark.parametrize("name", ["a\nb", "x.randlora_A"])
def test_names_that_no_reader_opens_are_refused(name):
    with pytest.raises(TargetError, match="no PyTorch module path"):
        get_peft_model(Net(), CONFIG, names={"proj": name})


def test_the_view_to_paste_matches_whatever_a_path_has_in_it():
    params = {"a+b(c)": {"k.[0]": jnp.ones((8, 8))}, "head": jnp.ones((4, 4))}
    config = RandLoraConfig(r=4, target_modules="all-linear")
    with pytest.warns(UserWarning, match="leaves out 1 array ") as caught:
        get_peft_model(params, config, views={"head": "i o"})
    (text,) = (str(warning.message) for warning in caught)
    views = eval(text.partition("views=")[2].partition("}")[0] + "}")
    model = get_peft_model(params, config, views={"head": "i o", **views})
    assert len(model.targeted_module_names) == 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"optional": ["vision/.*"]}, "optional: the rule 'vision/.*' matches nothing"),
        ({"layer_types": {nn.Dense: DENSE}}, "layer_types: a params pytree has no modules"),
    ],
)
def test_a_params_pytree_has_no_idle_rules_either(said, words):
    config = RandLoraConfig(r=4, target_modules=["proj"])
    params = {"proj": {"kernel": jnp.ones((8, 6))}}
    with pytest.raises(ConfigError, match=words):
        get_peft_model(params, config, views={"proj": "i o"}, **said)


@pytest.mark.torch
def test_nor_has_a_hugging_face_model():
    from transformers import BertConfig, FlaxBertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 31}
    base = FlaxBertModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16))
    config = RandLoraConfig(r=4, target_modules=["query"])
    with pytest.raises(ConfigError, match="layer_types: no module of this model is a Einsum"):
        get_peft_model(base, config, layer_types={nn.Einsum: DENSE})
    model = get_peft_model(base, config, layer_types={nn.Dense: DENSE}, rngs=jax.random.key(0))
    assert model.targeted_module_names


@pytest.mark.parametrize(
    ("argument", "rules", "words"),
    [
        ("views", {"proj.*": "i o", "proj": "o i"}, "'proj' decides nothing: .*, 'proj.* matches"),
        (
            "views",
            {"mlp/(gate|up)": "i o", "mlp/gate": "o i"},
            "'mlp/gate' decides nothing: .* put 'mlp/gate' before",
        ),
        ("views", {"proj": "i o", "proj/kernel": "o i"}, "'proj/kernel' decides nothing"),
        ("names", {"proj|norm": "a", "proj": "model.proj"}, "'proj' decides nothing"),
    ],
)
def test_a_rule_that_others_always_come_before_decides_nothing(argument, rules, words):
    with pytest.raises(ConfigError, match=words):
        get_peft_model(Net(), CONFIG, **{argument: rules})


def test_rules_that_agree_or_decide_elsewhere_stay():
    views = {"mlp/gate": "o i", "proj/kernel": "o i", "proj": "o i", "mlp/(gate|up)": "s i o"}
    config = RandLoraConfig(r=4, target_modules=["proj", "gate", "up"])
    model = get_peft_model(Net(), config, views=views)
    assert len(model.targeted_module_names) == 4  # up is a stack of two


class Einsums(nn.Module):
    """Has a class of layer that only a run tells."""

    @nn.compact
    def __call__(self, x):
        return nn.Einsum((8, 4), "bi,io->bo", name="up")(nn.Dense(8, name="proj")(x))


EINSUM = {nn.Einsum: LayerType(KernelLayout("i o"))}


@pytest.mark.parametrize("way", ["called", "applied", "jitted"])
def test_types_of_layers_that_a_linen_model_lacks_are_told_at_its_first_call(way):
    x = jnp.ones((2, 8))
    base = Einsums().bind(Einsums().init(jax.random.key(0), x))
    idle = {nn.Conv: LayerType(KernelLayout("i o"))}
    model = get_peft_model(base, RandLoraConfig(r=4, target_modules=["proj"]), layer_types=idle)
    calls = {
        "called": model,
        "applied": lambda x: model.apply(model.variables, x),
        "jitted": jax.jit(lambda x: model.apply(model.variables, x)),
    }
    for _ in range(2):  # it is no better the second time
        with pytest.raises(ConfigError, match="layer_types: no module of this model is a Conv"):
            calls[way](x)


def test_types_that_a_linen_model_has_are_looked_for_once():
    x = jnp.ones((2, 8))
    base = Einsums().bind(Einsums().init(jax.random.key(0), x))
    config = RandLoraConfig(r=4, target_modules=["proj"])
    for types in (EINSUM, {"flax.linen.linear.Einsum": LayerType(KernelLayout("i o"))}):
        model = get_peft_model(base, config, layer_types=types)
        model(x)
        assert not model._untold


@pytest.mark.parametrize("said", [{}, {"layer_types": EINSUM}])
def test_integers_of_a_linen_model_that_has_not_run_are_refused_at_wrapping(said):
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.ones, (8, 4), jnp.int8)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Bare(name="proj")(x)

    base = Outer().bind(Outer().init(jax.random.key(0), jnp.ones((2, 8))))
    with pytest.raises(TargetError, match="layer 'proj' cannot take an adapter: it holds int8"):
        get_peft_model(base, RandLoraConfig(r=4, target_modules=["proj"]), **said)
