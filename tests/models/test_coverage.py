"""What adapters leave out is said; what they take, and why not the rest, can be looked at."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, TargetError, get_peft_model
from randlora_jax.layer_types import of_einsum

ALL = RandLoraConfig(r=4, target_modules="all-linear")
X = jax.random.normal(jax.random.key(0), (5, 8))


class Own(nnx.Module):
    def __init__(self, rngs):
        self.w_in = nnx.Param(rngs.normal((8, 16)))
        self.w_out = nnx.Param(rngs.normal((16, 8)))
        self.scale = nnx.Param(rngs.normal((8,)))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.own, self.dense = Own(rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.conv = nnx.Embed(7, 8, rngs=rngs), nnx.Conv(8, 8, 3, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(8, 3, rngs=rngs)


def test_what_all_linear_leaves_out_is_said_once_with_the_line_to_paste():
    with pytest.warns(UserWarning, match="leaves out 4 arrays that look like kernels") as caught:
        get_peft_model(Net(), ALL)
    (text,) = [str(w.message) for w in caught if "kernels" in str(w.message)]
    assert "blocks/0/own/w_in (8, 16)" in text and "Own: LayerType(...)" in text
    line = text[text.index("views=") + len("views=") :]
    views = eval(line[: line.index("}") + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Net(), ALL, views=views)
    assert model.coverage().numbers()["left out"] == 7 * 8 + 3 * 8 * 8  # embedding, convolution


def test_a_list_of_targets_is_the_users_choice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Net(), RandLoraConfig(r=4, target_modules=["dense"]))


@pytest.mark.parametrize("names", (["own"], ["w_in"]))
def test_a_target_that_is_no_known_layer_is_refused_with_the_line_to_paste(names):
    with pytest.raises(TargetError, match=r"views=.*Own: LayerType"):
        get_peft_model(Net(), RandLoraConfig(r=4, target_modules=names))


def test_coverage_is_data_and_a_table():
    config = RandLoraConfig(r=4, target_modules=["dense"], modules_to_save=["head"])
    model = get_peft_model(Net(), config)
    found = {array.path: array for array in model.coverage()}
    assert found["blocks/1/dense/kernel"][1:] == ((8, 8), "adapted", "by 'default'")
    assert found["head/kernel"][2:] == ("trained whole", "by 'default'")
    assert found["embed/embedding"][2:] == ("left out", "it is an embedding")
    assert found["conv/kernel"].why == "it is a convolution"
    assert found["blocks/0/own/w_in"].why == "what a Own computes with it is unknown"
    assert model.coverage().numbers() == {
        "adapted": 128,
        "trained whole": 27,
        "left out": 56 + 192 + 512,
    }
    table = str(model.coverage())
    assert "blocks/*/dense/kernel (2)" in table and table.endswith("760 numbers left out")
    model.add_adapter("second", RandLoraConfig(r=4, target_modules=["head"]))
    model.set_adapter("second")
    found = {array.path: array for array in model.coverage()}
    assert found["head/kernel"].taken == "trained whole"  # by the first


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(num_heads=2)(x, x))


def test_a_linen_model_says_how_its_layers_could_tell_their_types():
    net = Attention()
    bound = net.bind(net.init(jax.random.key(0), X[None]))
    with pytest.warns(UserWarning, match=r"query/kernel \(8, 2, 4\).*sample_inputs="):
        get_peft_model(bound, ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(bound, ALL, sample_inputs=(X[None],))
    assert len(model.targeted_module_names) == 5


def test_names_that_are_the_jax_models_own_are_said_when_saved(tmp_path):
    config = RandLoraConfig(r=4, target_modules=["dense", "lm_head"])
    model = get_peft_model(Net(), config, names={"head": "lm_head"})
    with pytest.warns(UserWarning, match=r"2 adapted layers .* 'blocks.0.dense'.*names="):
        model.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "same", names={"blocks.*": r"\g<0>"})
        rule = {r"blocks/(\d)/dense": r"model.layers.\1.up"}
        model.save_pretrained(tmp_path / "theirs", names=rule)
    text = (tmp_path / "theirs" / "adapter_config.json").read_text()
    assert "lm_head" in text and '"up"' in text
    model.load_adapter(tmp_path / "same", "again")


class Stacked(nnx.Module):
    def __init__(self):
        self.dense = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 3)
        )

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.dense
        )


def test_that_a_stack_is_called_as_here_does_not_say_where_its_numbers_stand(tmp_path):
    model = get_peft_model(nnx.Sequential(Stacked()), RandLoraConfig(r=4, target_modules=["dense"]))
    with pytest.warns(
        UserWarning, match=r"'layers.0.0.dense'.*'\.\.\.\{\}\.\.\.'.*'layers.0.\{\}.dense'"
    ):
        model.save_pretrained(tmp_path / "own", names={".*": r"\g<0>"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "said", names={"(.*)/dense": r"\1.{}.dense"})


class Split(nnx.Module):
    """A kernel to heads, in a class that nobody knows."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.normal((8, 2, 4)))

    def __call__(self, x):
        return jnp.einsum("bd,dnh->bnh", x, self.w[...])


class OneSplit(nnx.Module):
    def __init__(self, stacked):
        rngs = nnx.Rngs(0)
        stack = nnx.split_rngs(splits=3)(nnx.vmap(Split))
        self.split = (stack if stacked else Split)(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)


@pytest.mark.parametrize("stacked", [False, True])
def test_what_the_axes_of_three_mean_is_left_to_the_user(stacked):
    with pytest.warns(UserWarning, match="leaves out 1 array that looks like a kernel") as caught:
        get_peft_model(OneSplit(stacked), ALL)
    text = next(str(w.message) for w in caught if "looks like" in str(w.message))
    line = text[text.index("views=") + len("views=") :]
    views = eval(line[: line.index("}") + 1])
    assert views == {"split/w": "? ? ? ?" if stacked else "? ? ?"}
    with pytest.raises(ConfigError, match=r"views: 'split/w': .*put a letter for each \?"):
        get_peft_model(OneSplit(stacked), ALL, views=views)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_file_of_a_layer_that_is_an_array_here_says_what_to_give(stacked, tmp_path):
    types = {Split: of_einsum("bd,dnh->bnh", leaf="w")}
    config = RandLoraConfig(r=4, target_modules=["split"])
    get_peft_model(OneSplit(stacked), config, layer_types=types).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"has an array 'split/w' there: give the layer_types="):
        RandLoraModel.from_pretrained(OneSplit(stacked), tmp_path)
    RandLoraModel.from_pretrained(OneSplit(stacked), tmp_path, layer_types=types)


class Holds(nnx.Module):
    """A layer, and a head of the user's that holds one array."""

    def __init__(self, held, name="weights"):
        self.dense, self.head = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Module()
        setattr(self.head, name, held)


@pytest.mark.parametrize(
    ("shape", "name"), [((8, 1), "weights"), ((1, 8), "weight"), ((1, 8), "kernel")]
)
def test_a_kernel_of_one_output_or_input_is_told_too(shape, name):
    held = nnx.Param(jnp.ones(shape))
    with pytest.warns(UserWarning, match=f"leaves out 1 array .*'head/{name} "):
        get_peft_model(Holds(held, name), ALL)


@pytest.mark.parametrize("shape", [(1, 8), (1, 1), (8,), (1, 1, 8)])
def test_a_token_or_a_gain_looks_like_no_kernel(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Holds(nnx.Param(jnp.ones(shape))), ALL)
    assert len(model.coverage()) == 1


def test_arrays_that_nnx_takes_for_no_parameters_are_listed_and_not_warned_of():
    for held in (jnp.ones((8, 3)), nnx.List([jnp.ones((8, 3)), jnp.arange(6).reshape(2, 3)])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = get_peft_model(Holds(held), ALL)
        _, constant = model.coverage()
        assert constant.path.startswith("head/weights") and constant.why == "it is no parameter"


class Scale(nnx.Variable):
    """No parameter to nnx."""


def test_a_module_to_save_without_a_parameter_is_said():
    config = RandLoraConfig(r=4, target_modules=["dense"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match=r"nothing to train in 'head'.*nnx\.Param"):
        get_peft_model(Holds(Scale(jnp.ones(8))), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Holds(nnx.Param(jnp.ones(8)), "scale"), config)
    assert model.coverage().numbers()["trained whole"] == 8
