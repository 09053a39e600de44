"""A small network in nnx, in linen and in PyTorch, with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from randlora_jax import AdapterParam

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
