"""docs/many-adapters.md runs as it stands, and its rows are what each adapter gives alone."""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

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


class Scanned(nnx.Module):
    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.dense = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))(keys)

    def __call__(self, x):
        through = nnx.scan(lambda x, f: f(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return through(x, self.dense)


def test_a_scanned_model_runs_row_by_row_as_the_page_says():
    model = get_peft_model(Scanned(), RandLoraConfig(r=4, target_modules=["dense"]), "a")
    model.add_adapter("b", RandLoraConfig(r=4, target_modules=["dense"]))
    for seed, name in enumerate("ab"):
        train_a_little(model, name, seed)
    model.stack_adapters(4)
    x, rows = jax.random.normal(jax.random.key(5), (3, 8)), model.rows(["a", "__base__", "b"])
    line = re.search(r"`(nnx\.vmap\(.*?\(model, x, rows\))`", PAGE, flags=re.DOTALL)[1]
    found = eval(line, {"nnx": nnx, "model": model, "x": x, "rows": rows})
    expected = model(x, adapter_names=["a", "__base__", "b"])
    np.testing.assert_allclose(found, expected, atol=1e-6 * float(np.abs(expected).max()))
    assert np.abs(expected - Scanned()(x)).max(1).tolist()[1] == 0
    assert (np.abs(expected - Scanned()(x)).max(1)[[0, 2]] > 0.1).all()
