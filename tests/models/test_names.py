"""Canonical names as data: renamed modules, stacks and fused kernels, through real files."""

import dataclasses
import json
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, TargetError, get_peft_model
from randlora_jax.models.names import Names

pytestmark = pytest.mark.torch

X = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(12, 20), torch.nn.Linear(12, 20)
        self.down = torch.nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([TorchBlock() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Fused(nn.Module):
    """Gate and up in one kernel, (2, in, out), as some JAX models hold them."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 12, 20))
        bias = self.param("bias", nn.initializers.zeros, (2, 20))
        return jnp.einsum("...i,pio->p...o", x, kernel) + bias[:, None]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        gate, up = Fused(name="gate_up")(x)
        return x + nn.Dense(12, name="down")(jnp.tanh(gate) * up), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="layers")(x, None)[0]


VIEWS = {"layers/gate_up": "s s i o", "layers/down": "s i o"}
NAMES = {
    "layers/gate_up": ["blocks.{}.gate", "blocks.{}.up"],
    "layers/down": "blocks.{}.down",
}


def torch_net():
    torch.manual_seed(0)
    return TorchNet()


def flax_net():
    def stack(name, leaf):
        return np.stack(
            [getattr(getattr(b, name), leaf).detach().numpy() for b in torch_net().blocks]
        )

    def kernel(name):
        return stack(name, "weight").transpose(0, 2, 1)

    params = {
        "gate_up": {
            "kernel": jnp.asarray(np.stack([kernel("gate"), kernel("up")], 1)),
            "bias": jnp.asarray(np.stack([stack("gate", "bias"), stack("up", "bias")], 1)),
        },
        "down": {"kernel": jnp.asarray(kernel("down")), "bias": jnp.asarray(stack("down", "bias"))},
    }
    return Net().bind({"params": {"layers": params}})


def run(model):
    return np.asarray(model.apply(model.variables, X))


def torch_run(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


def same(found, expected, base):
    assert np.std(expected - base) >= 0.1 * np.std(base)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bias", ["none", "all"])
def test_stacked_and_fused_kernels_are_pefts_modules_one_by_one(bias, tmp_path):
    targets = ["gate", "up", "down"]
    config = RandLoraConfig(r=5, randlora_alpha=10, target_modules=targets, bias=bias)
    ours = get_peft_model(flax_net(), config, views=VIEWS, names=NAMES)
    np.testing.assert_allclose(run(ours), torch_run(torch_net()), rtol=1e-5, atol=1e-5)
    noise = np.random.default_rng(1)
    move = lambda x: x + noise.normal(0, 0.3, x.shape).astype("f")  # noqa: E731
    ours.variables = {**ours.variables, "randlora": jax.tree.map(move, ours.variables["randlora"])}
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_net(), tmp_path)
    same(torch_run(theirs), run(ours), torch_run(torch_net()))
    assert theirs.targeted_module_names == [
        f"blocks.{i}.{name}" for i in range(3) for name in ("gate", "up", "down")
    ]
    assert set(ours.targeted_module_names) == set(theirs.targeted_module_names)
    for name, found in ours.delta_weights().items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        assert np.abs(found - expected.numpy()).max() <= 1e-6 * expected.abs().max()
    again = RandLoraModel.from_pretrained(flax_net(), tmp_path, views=VIEWS, names=NAMES)
    np.testing.assert_array_equal(run(again), run(ours))


def test_a_part_of_one_array_is_refused():
    for part in (["gate"], r"blocks\.0\..*"):
        with pytest.raises(TargetError, match="Adapt all or none"):
            get_peft_model(
                flax_net(), RandLoraConfig(r=5, target_modules=part), views=VIEWS, names=NAMES
            )


def test_the_rule_that_the_warning_offers_keeps_the_names_of_stacks(tmp_path):
    model = get_peft_model(flax_net(), RandLoraConfig(r=5, target_modules=["down"]), views=VIEWS)
    with pytest.warns(UserWarning, match=r"'layers/down': '\.\.\.\{\}\.\.\.'") as caught:
        model.save_pretrained(tmp_path / "warned")
    (text,) = [str(w.message) for w in caught if "names=" in str(w.message)]
    names = eval(
        re.search(r"names=(.*) says that they are the same", text[text.rindex("names=") :])[1]
    )
    assert names == {"layers/down": "layers.{}.down"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "same", names=names)
    config = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "warned" / "adapter_config.json").read_text())
    with pytest.raises(TargetError, match=r"of 'layers/down' one name: .*'layers\.{}\.down'"):
        model.save_pretrained(tmp_path / "one", names={"layers/(.*)": r"model.\1"})


def test_unnamed_stacks_are_saved_by_their_paths_and_read_back(tmp_path):
    """The index of each layer comes before the last part of its path."""
    model = get_peft_model(flax_net(), RandLoraConfig(r=5, target_modules=["down"]), views=VIEWS)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, model.variables["randlora"])
    model.variables = {**model.variables, "randlora": trained}
    assert model.targeted_module_names == [f"layers.{i}.down" for i in range(3)]
    model.save_pretrained(tmp_path)
    again = RandLoraModel.from_pretrained(flax_net(), tmp_path, views=VIEWS)
    np.testing.assert_array_equal(run(again), run(model))


def test_rules():
    rules = Names({r"layers/(\d+)/attn/(q|k)": r"model.layers.\1.self_attn.\2_proj"})
    assert rules.of(("layers", 3, "attn", "q")) == ("model.layers.3.self_attn.q_proj",)
    assert rules.of(("layers", 3, "mlp")) == ("layers.3.mlp",)
    with pytest.raises(TargetError, match=r"gives the 6 matrices \(3, 2\) of 'a' 2 names"):
        Names({"a": ["x", "y"]}).of(("a",), (3, 2))
    with pytest.raises(TargetError, match="no kernel tells what stack the braces stand for"):
        Names({"norm": "layers.{}.norm"}).of(("norm",))
    with pytest.raises(TargetError, match="both have the canonical name"):
        get_peft_model(
            flax_net(),
            RandLoraConfig(target_modules=["x"]),
            views=VIEWS,
            names={"layers/gate_up": ["x.{}.a", "x.{}.b"], "layers/down": "x.{}.a"},
        )


class NormedBlock(nnx.Module):
    def __init__(self, key):
        self.norm = nnx.LayerNorm(12, rngs=nnx.Rngs(key))
        self.down = nnx.Linear(12, 12, rngs=nnx.Rngs(key))


def test_what_cannot_be_saved_is_told_before_it_is_trained(tmp_path):
    """A scanned norm has no kernel that tells its stack."""
    stack = nnx.vmap(NormedBlock)(jax.random.split(jax.random.key(0), 3))
    config = RandLoraConfig(r=4, target_modules=["down"], modules_to_save=["norm"])
    with pytest.warns(UserWarning, match=r"'default' can be trained.*norms, out of modules_to"):
        model = get_peft_model(stack, config, names={"(.*)": r"layers.{}.\1"})
    with pytest.raises(TargetError, match="no kernel tells what stack the braces stand for"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(model.unload(), dataclasses.replace(config, modules_to_save=None))


class Tailed(nnx.Module):
    """A stack, and a norm and a head that PyTorch calls otherwise."""

    def __init__(self):
        self.blocks = nnx.vmap(NormedBlock)(jax.random.split(jax.random.key(0), 3))
        self.last = nnx.LayerNorm(12, epsilon=1e-5, rngs=nnx.Rngs(1))
        self.head = nnx.Linear(12, 5, rngs=nnx.Rngs(2))

    def __call__(self, x):
        def step(x, block):
            return x + block.down(block.norm(x))

        x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.head(self.last(x))


class TorchTailed(torch.nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.h = torch.nn.ModuleList(
            [
                torch.nn.ModuleDict(
                    {"norm": torch.nn.LayerNorm(12, eps=1e-6), "down": torch.nn.Linear(12, 12)}
                )
                for _ in range(3)
            ]
        )
        self.ln_f, self.lm_out = torch.nn.LayerNorm(12), torch.nn.Linear(12, 5)
        with torch.no_grad():
            for i, block in enumerate(self.h):
                block["down"].weight.copy_(torch.tensor(np.array(ours.blocks.down.kernel[i].T)))
            self.lm_out.weight.copy_(torch.tensor(np.array(ours.head.kernel[...].T)))
            for layer in (self.lm_out, *(block["down"] for block in self.h)):
                layer.bias.zero_()

    def forward(self, x):
        for block in self.h:
            x = x + block["down"](block["norm"](x))
        return self.lm_out(self.ln_f(x))


TAILED = {r"blocks/(.*)": r"h.{}.\1", "last": "ln_f", "head": "lm_out"}


@pytest.mark.parametrize("when", ["wrapping", "saving"])
def test_names_said_when_saving_alone_are_those_of_what_is_trained_whole(tmp_path, when):
    """And a rule that fits no norm of the stack is none of a file without it."""
    ours = Tailed()
    theirs = TorchTailed(ours)
    whole = ["last", "head"] if when == "saving" else ["ln_f", "lm_out"]
    config = RandLoraConfig(
        r=4, randlora_alpha=40, target_modules=["down"], modules_to_save=whole, init_weights=False
    )
    names = {"names": TAILED} if when == "wrapping" else {}
    model = get_peft_model(ours, config, rngs=nnx.Rngs(3), **names)
    state = nnx.state(model, AdapterParam)
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state)
    nnx.update(model, moved)
    base = torch_run(theirs)
    model.save_pretrained(tmp_path, names=TAILED)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(written["modules_to_save"]) == {"ln_f", "lm_out"}
    opened = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    same(np.asarray(model(X)), torch_run(opened), base)
    with opened.disable_adapter():
        np.testing.assert_array_equal(torch_run(opened), base)
    again = RandLoraModel.from_pretrained(Tailed(), tmp_path, names=TAILED)
    np.testing.assert_array_equal(np.asarray(again(X)), np.asarray(model(X)))


@pytest.mark.parametrize("head", ["out", "head"])
def test_names_by_which_peft_would_train_more_are_refused(tmp_path, head):
    config = RandLoraConfig(r=4, target_modules=["down"], modules_to_save=["head"])
    model = get_peft_model(Tailed(), config)
    words = rf"\['{head}'\], as names=.* would train 'x.{head}' besides"
    with pytest.raises(TargetError, match=words):
        model.save_pretrained(tmp_path, names=TAILED | {"head": head, "last": f"x.{head}"})


@pytest.mark.parametrize(
    ("saved", "names", "found"),
    [
        (["blocks.down"], None, ["head"]),
        (["down"], None, ["head"]),
        (["h.1.down"], TAILED, "takes 'h.1.down', a part of 'blocks.down'"),
        (["blocks.1.down"], None, "takes 'blocks.1.down', a part of 'blocks.down'"),
        (["blocks.down", "head"], None, "matches no layer|trains whole all that"),
    ],
)
def test_a_stack_is_adapted_or_trained_whole(saved, names, found):
    config = RandLoraConfig(r=4, target_modules=["down", "head"], modules_to_save=saved)
    if isinstance(found, str):
        with pytest.raises(TargetError, match=found):
            get_peft_model(Tailed(), config, names=names)
        return
    model = get_peft_model(Tailed(), config, names=names)
    assert model.targeted_module_names == found
    whole = {
        path for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam)) if "down" in path
    }
    assert len(whole) == 2, "kernel and bias, and no lambda"


def test_a_norm_in_a_scan_without_a_rule_is_told_too(tmp_path):
    config = RandLoraConfig(r=4, target_modules=["down"], modules_to_save=["blocks.norm"])
    with pytest.warns(UserWarning, match=r"can be trained.*shape \(3, 12\): a scan stacks it"):
        model = get_peft_model(Tailed(), config)
    with pytest.raises(TargetError, match="a scan stacks it"):
        model.save_pretrained(tmp_path)


class Rooted(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(12, 12, rngs=nnx.Rngs(0))
        self.token = nnx.Param(jnp.zeros(12))

    def __call__(self, x):
        return self.proj(x + self.token)


@pytest.mark.parametrize("when", ["wrapping", "saving"])
def test_a_rule_for_every_path_may_meet_arrays_of_the_model_itself(tmp_path, when):
    same = {"names": {".*": r"\g<0>"}}
    config = RandLoraConfig(r=4, target_modules=["proj"])
    model = get_peft_model(Rooted(), config, **same if when == "wrapping" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, **same if when == "saving" else {})
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["proj"]


class Scaled(nnx.Module):
    """A head with two arrays that PyTorch both calls ``weight``, and two norms."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(12, 12, rngs=rngs)
        self.pre, self.post = (nnx.LayerNorm(12, use_bias=False, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(12, 3, use_bias=False, rngs=rngs)
        self.head.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return self.head(self.post(self.up(self.pre(x)))) * self.head.scale[...]


SAME = {".*": r"\g<0>"}
ONE_NORM = {"pre|post": "norm", **SAME}
BOTH = {
    "head": (SAME, r"'head.kernel' and 'head.scale' both are 'head.weight' in PyTorch"),
    "norm": (ONE_NORM, r"'p\w+.scale' and 'p\w+.scale' both are 'norm.weight' in PyTorch"),
}


@pytest.mark.parametrize("saved", BOTH)
def test_two_leaves_of_one_name_in_pytorch_do_not_overwrite_each_other(tmp_path, saved):
    names, words = BOTH[saved]
    config = RandLoraConfig(r=4, target_modules=["up"], modules_to_save=[saved])
    with pytest.warns(UserWarning, match=rf"'default' can be trained.*{words}"):
        model = get_peft_model(Scaled(), config, names=names)
    with pytest.raises(TargetError, match=words):
        model.save_pretrained(tmp_path)


def test_two_leaves_do_not_both_get_what_a_file_holds_by_their_name(tmp_path):
    config = RandLoraConfig(r=4, target_modules=["up"], modules_to_save=["pre"])
    model = get_peft_model(Scaled(), config, names=SAME)
    model.save_pretrained(tmp_path, names={"pre": "norm", **SAME})
    with pytest.raises(TargetError, match=BOTH["norm"][1]):
        RandLoraModel.from_pretrained(Scaled(), tmp_path, names=ONE_NORM)
