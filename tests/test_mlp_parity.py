"""nnx and plain linen models against PEFT on a PyTorch twin, both ways, over awkward ranks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

SIZES = {"tall": (7, 24), "square": (24, 24), "wide": (24, 10)}
TARGETS = list(SIZES)
X = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (n_in, n_out) in SIZES.items():
            setattr(self, name, torch.nn.Linear(n_in, n_out))
        self.head = torch.nn.Linear(10, 3)

    def forward(self, x):
        for name in SIZES:
            x = torch.tanh(getattr(self, name)(x))
        return self.head(x)


class NnxNet(nnx.Module):
    def __init__(self):
        for name, (n_in, n_out) in [*SIZES.items(), ("head", (10, 3))]:
            setattr(self, name, nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        for name in SIZES:
            x = jnp.tanh(getattr(self, name)(x))
        return self.head(x)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name, (_, n_out) in SIZES.items():
            x = jnp.tanh(nn.Dense(n_out, name=name)(x))
        return nn.Dense(3, name="head")(x)


def torch_net():
    torch.manual_seed(0)
    return TorchNet()


def nnx_net(twin):
    net = NnxNet()
    for name in [*SIZES, "head"]:
        layer = getattr(twin, name)
        getattr(net, name).kernel[...] = jnp.asarray(layer.weight.detach().numpy().T)
        getattr(net, name).bias[...] = jnp.asarray(layer.bias.detach().numpy())
    return net


def linen_net(twin):
    params = {
        name: {
            "kernel": jnp.asarray(getattr(twin, name).weight.detach().numpy().T),
            "bias": jnp.asarray(getattr(twin, name).bias.detach().numpy()),
        }
        for name in [*SIZES, "head"]
    }
    return LinenNet().bind({"params": params})


def nnx_run(model):
    return np.asarray(model(jnp.asarray(X)))


def linen_run(model):
    return np.asarray(jax.jit(model.apply)(model.variables, X))


def nnx_randomise(model, rng):
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(move, nnx.state(model, AdapterParam)))


def linen_randomise(model, rng):
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    moved = jax.tree.map(move, model.variables["randlora"])
    model.variables = {**model.variables, "randlora": moved}


KINDS = {"nnx": (nnx_net, nnx_run, nnx_randomise), "linen": (linen_net, linen_run, linen_randomise)}


def torch_run(model):
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


def assert_same(found, expected, base):
    assert np.std(expected - base) >= 0.1 * np.std(base)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# 5 divides nothing, 12 is above one layer's min, 30 is above them all
@pytest.mark.parametrize("r", [1, 5, 12, 30])
@pytest.mark.parametrize("apply", ["factored", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_peft(kind, apply, r, tmp_path):
    make, run, _ = KINDS[kind]
    config = peft.RandLoraConfig(
        r=r, randlora_alpha=2 * r, target_modules=TARGETS, modules_to_save=["head"], bias="all"
    )
    theirs = peft.get_peft_model(torch_net(), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(make(torch_net()), tmp_path, apply=apply)
    assert_same(run(ours), torch_run(theirs), torch_run(torch_net()))


@pytest.mark.parametrize("r", [1, 5, 12, 30])
@pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_peft(kind, bias, r, tmp_path):
    make, run, randomise = KINDS[kind]
    config = RandLoraConfig(
        r=r, randlora_alpha=2 * r, target_modules=TARGETS, modules_to_save=["head"], bias=bias
    )
    ours = get_peft_model(make(torch_net()), config)
    np.testing.assert_array_equal(run(ours), run(get_peft_model(make(torch_net()), config)))
    randomise(ours, np.random.default_rng(1))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_net(), tmp_path)
    assert_same(run(ours), torch_run(theirs), torch_run(torch_net()))
    again = RandLoraModel.from_pretrained(make(torch_net()), tmp_path, is_trainable=True)
    np.testing.assert_array_equal(run(again), run(ours))
    assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    frozen = RandLoraModel.from_pretrained(make(torch_net()), tmp_path)
    assert frozen.get_nb_trainable_parameters()[0] == 0
