"""The network of PEFT's RandLoRA tests, in nnx, in linen and in PyTorch."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

SIZES = {"lin0": (10, 20), "lin1": (20, 20), "lin2": (20, 20), "lin3": (20, 2)}
X = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)


class TorchMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, torch.nn.Linear(*size))

    def forward(self, x):
        for name in ("lin0", "lin1", "lin2"):
            x = torch.relu(getattr(self, name)(x))
        return torch.log_softmax(self.lin3(x), -1)


class NnxMLP(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        for name, size in SIZES.items():
            layer = nnx.Linear(*size, rngs=rngs, param_dtype=dtype)
            setattr(self, name, layer)

    def __call__(self, x):
        for name in ("lin0", "lin1", "lin2"):
            x = nnx.relu(getattr(self, name)(x))
        return nnx.log_softmax(self.lin3(x))


class LinenMLP(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for name, (_, n_out) in SIZES.items():
            x = nn.Dense(n_out, name=name, param_dtype=self.dtype)(x)
            x = nn.log_softmax(x) if name == "lin3" else nn.relu(x)
        return x


def linen_mlp(dtype=jnp.float32):
    module = LinenMLP(dtype)
    return module.bind(module.init(jax.random.key(0), X))


MAKE = {"nnx": NnxMLP, "linen": linen_mlp}


def run(model, x=X):
    if hasattr(model, "variables"):
        return np.asarray(model.apply(model.variables, x))
    return np.asarray(model(jnp.asarray(x)))


def config(**kwargs):
    """PEFT's settings in these tests: two layers of one shape, lambda drawn at random."""
    return RandLoraConfig(**{"target_modules": ["lin1", "lin2"], "init_weights": False} | kwargs)


def wrapped(base, first="default", second="other", **kwargs):
    """A model with two adapters of the same settings."""
    model = get_peft_model(base, config(**kwargs), first, rngs=jax.random.key(1))
    model.add_adapter(second, config(**kwargs), rngs=jax.random.key(2))
    return model


def outputs(model, *names):
    """What the model computes with each adapter in turn; no two the same."""
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(run(model))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(found))
    return found


def torch_mlp(ours=None):
    """PyTorch's twin of an nnx model."""
    torch.manual_seed(0)
    twin = TorchMLP()
    for name in SIZES if ours else ():
        layer = getattr(ours, name)
        with torch.no_grad():
            getattr(twin, name).weight[:] = torch.tensor(np.asarray(layer.kernel[...]).T.copy())
            getattr(twin, name).bias[:] = torch.tensor(np.asarray(layer.bias[...]))
    return twin


def trained(model):
    return dict(nnx.to_flat_state(nnx.state(model, AdapterParam)))
