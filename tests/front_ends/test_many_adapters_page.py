"""docs/many-adapters.md runs as it stands, and its rows are what each adapter gives alone."""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from randlora_jax import AdapterParam

PAGE = (Path(__file__).parents[2] / "docs" / "many-adapters.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def train_a_little(model, adapter_name, seed):
    """Numbers for an adapter that is zero."""
    model.set_adapter(adapter_name)
    state = nnx.state(model, AdapterParam)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, drawn))


def test_it_runs_as_it_stands():
    first, stacks, combined, mapped, linen = BLOCKS
    page = {}
    exec(first, page)
    model, x = page["model"], page["x"]
    for seed, name in enumerate(("french", "legal")):
        train_a_little(model, name, seed)
    alone = {}
    for name in ("french", "legal"):
        model.set_adapter(name)
        alone[name] = model(x)[0]
    with model.disable_adapter():
        alone["__base__"] = model(x)[0]
    assert float(np.abs(alone["french"] - alone["legal"]).max()) > 0.1

    def same(y, *names):
        expected = np.stack([alone[name] for name in names])
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())

    same(model(x, adapter_names=["legal", "__base__", "french"]), "legal", "__base__", "french")
    exec(stacks, page)
    same(page["y"], "french", "__base__", "legal")
    exec(combined, page)
    same(page["y"][1:], "french", "legal")
    exec(mapped, page)
    same(page["y"], "french", "__base__", "legal")
    exec(linen, page)
    np.testing.assert_allclose(page["y"], page["net"](x), atol=1e-6)  # its adapter is new
