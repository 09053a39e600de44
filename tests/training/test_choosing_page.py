"""The optimizer of docs/choosing.md gives a head its own rate, whatever the model is made with."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from randlora_jax import RandLoraConfig, get_peft_model

PAGE = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
CONFIG = RandLoraConfig(r=4, target_modules=["hidden"], modules_to_save=["classifier"])
X = jnp.linspace(-1, 1, 32).reshape(4, 8)


class Net(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.classifier = nnx.Linear(8, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.classifier(self.hidden(x))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="classifier")(nn.Dense(8, name="hidden")(x))


@pytest.fixture
def optimizer():
    names = {}
    exec(PAGE.split("```python\n")[1].split("```")[0], names)
    return names["optimizer"]


def farthest(before, after):
    """How far the numbers of each part went: (adapter, head)."""
    moved = {"adapter": 0.0, "head": 0.0}
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        name = "head" if "classifier" in jax.tree_util.keystr(path) else "adapter"
        moved[name] = max(moved[name], float(abs(new - old).max()))
    return moved["adapter"], moved["head"]


def test_linen(optimizer):
    bound = LinenNet().bind(LinenNet().init(jax.random.key(0), X))
    model = get_peft_model(bound, CONFIG)
    trained, frozen = model.split()

    def loss(trained):
        return (model.apply({**frozen, "randlora": trained}, X) ** 2).mean()

    updates, _ = optimizer.update(jax.grad(loss)(trained), optimizer.init(trained), trained)
    moved = farthest(trained, jax.tree.map(jnp.add, trained, updates))
    assert moved == pytest.approx((2e-3, 1e-2), rel=0.05)


def test_nnx(optimizer):
    model = get_peft_model(Net(), CONFIG)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.LoRAParam))
    state = nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)

    def loss(model):
        return (model(X) ** 2).mean()

    state.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    assert farthest(before, nnx.state(model, nnx.LoRAParam)) == pytest.approx(
        (2e-3, 1e-2), rel=0.05
    )
