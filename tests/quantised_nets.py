"""Small models that qwix quantises, in nnx and in linen, and wrapped with an adapter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import RandLoraConfig, get_peft_model

qwix = pytest.importorskip("qwix")

CONFIG = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
FRONT_ENDS = pytest.mark.parametrize("front_end", ["nnx", "linen"])


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 32, use_bias=False, rngs=rngs)
        self.heads = nnx.Einsum("BTD,DNH->BTNH", (32, 4, 16), rngs=rngs)

    def __call__(self, x):
        return self.heads(self.down(nnx.relu(self.up(x)))[None])[0]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="up")(x))
        x = nn.Dense(32, use_bias=False, name="down")(x)
        return nn.DenseGeneral((4, 16), name="heads")(x)


def provider(kind, tile=None, **more):
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=kind, tile_size=tile, **more)
    return qwix.PtqProvider([rule])


def quantised_nnx(*how, **more):
    return qwix.quantize_model(Net(), provider(*how, **more), X)


def quantised_linen(*how, **more):
    module = qwix.quantize_model(LinenNet(), provider(*how, **more))
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    numbers = LinenNet().init(jax.random.key(0), X)["params"]
    return module.bind({"params": qwix.quantize_params(numbers, shapes)})


QUANTISE = {"nnx": quantised_nnx, "linen": quantised_linen}


def samples(front_end):
    return {"sample_inputs": (X,)} if front_end == "linen" else {}


def wrapped(front_end, kind, tile=None, scale=0.1, **more):
    """A quantised model with an adapter that moves its outputs, and what these were before."""
    base = QUANTISE[front_end](kind, tile, **more)
    plain = base(X)
    model = get_peft_model(base, CONFIG, **samples(front_end))
    assert (model(X) == plain).all()
    draw = np.random.default_rng(1)

    def drawn(leaf):
        return jnp.asarray(draw.normal(0, scale, leaf.shape), leaf.dtype)

    if front_end == "nnx":
        nnx.update(model, jax.tree.map(drawn, nnx.state(model, nnx.LoRAParam)))
    else:
        trained, frozen = model.split()
        model.variables = {**frozen, "randlora": jax.tree.map(drawn, trained)}
    return model, plain
