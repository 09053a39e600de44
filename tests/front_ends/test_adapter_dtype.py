"""autocast_adapter_dtype=False trains an adapter in the base model's own 16 bits, as in PEFT."""

from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["hidden"], modules_to_save=["head"])
X = jnp.linspace(-1, 1, 32).reshape(4, 8)


class Net(nnx.Module):
    def __init__(self, dtype):
        self.hidden = nnx.Linear(8, 12, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(12, 2, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.hidden(x))


def dtypes(model):
    return {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_leaves_gradients_optimizer_and_file_hold_it(dtype, tmp_path):
    model = get_peft_model(Net(dtype), CONFIG, autocast_adapter_dtype=False)
    assert dtypes(model) == {jnp.dtype(dtype)}
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.LoRAParam)
    loss = lambda model: (model(X) ** 2).astype(jnp.float32).mean()  # noqa: E731
    before = loss(model)
    for _ in range(5):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    assert loss(model) < before and dtypes(model) == {jnp.dtype(dtype)}

    model.save_pretrained(tmp_path)
    same = {"is_trainable": True, "autocast_adapter_dtype": False}
    again = RandLoraModel.from_pretrained(Net(dtype), tmp_path, **same)
    pairs = zip(
        *(jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, again)), strict=True
    )
    assert all(x.dtype == y.dtype and (x == y).all() for x, y in pairs)
    assert (model(X) == again(X)).all()
    wide = RandLoraModel.from_pretrained(Net(dtype), tmp_path, is_trainable=True)
    assert dtypes(wide) == {jnp.dtype("float32")} and (wide(X) == model(X)).all()


def test_float32_stays_float32_and_so_does_the_default():
    assert dtypes(get_peft_model(Net(jnp.float32), CONFIG, autocast_adapter_dtype=False)) == {
        jnp.dtype("float32")
    }
    assert dtypes(get_peft_model(Net(jnp.bfloat16), CONFIG)) == {jnp.dtype("float32")}


def test_linen():
    net = nn.Sequential([nn.Dense(12, name="hidden", param_dtype=jnp.bfloat16)])
    bound = net.bind(net.init(jax.random.key(0), X))
    config = RandLoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(bound, config, autocast_adapter_dtype=False)
    assert {x.dtype for x in jax.tree.leaves(model.split()[0])} == {jnp.dtype("bfloat16")}
    model.add_adapter("wide", config)
    model.set_adapter("wide")
    assert {x.dtype for x in jax.tree.leaves(model.split()[0])} == {jnp.dtype("float32")}


def test_an_abstract_model_says_so():
    base = nnx.eval_shape(lambda: Net(jnp.bfloat16))
    assert dtypes(get_peft_model(base, CONFIG, autocast_adapter_dtype=False)) == {
        jnp.dtype("bfloat16")
    }


def test_it_is_true_or_false():
    with pytest.raises(ConfigError, match="autocast_adapter_dtype: expected True or False"):
        get_peft_model(Net(jnp.bfloat16), CONFIG, autocast_adapter_dtype="bfloat16")


@pytest.mark.torch
def test_peft_holds_the_same(tmp_path):
    import peft
    import torch

    model = get_peft_model(Net(jnp.bfloat16), CONFIG, autocast_adapter_dtype=False)
    draw = np.random.default_rng(0)
    state = nnx.state(model, nnx.LoRAParam)
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), state)
    nnx.update(model, state)
    model.save_pretrained(tmp_path)

    parts = {"hidden": torch.nn.Linear(8, 12), "head": torch.nn.Linear(12, 2)}
    base = torch.nn.Sequential(OrderedDict(parts)).to(torch.bfloat16)
    opened = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    theirs = {k: p for k, p in opened.named_parameters() if "randlora_lambda" in k}
    (mine,) = (x for path, x in nnx.to_flat_state(state) if "randlora_lambda" in path)
    assert [p.dtype for p in theirs.values()] == [torch.bfloat16]
    (held,) = (p.detach().float().numpy() for p in theirs.values())
    assert (held == np.asarray(mine, np.float32)).all()
