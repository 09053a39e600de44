"""docs/checkpoints.md, block by block, in the folder where it is started; and what each must reach.

XLA_FLAGS=--xla_force_host_platform_device_count=4 python tests/checkpoints_page.py
"""

import re
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from randlora_jax import AdapterParam

PAGE = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def leaves(model, which=...):
    return jax.tree.leaves(nnx.state(model, which))


def same(one, other, which=...):
    jax.tree.map(np.testing.assert_array_equal, leaves(one, which), leaves(other, which))


def main() -> None:
    assert jax.device_count() == 4
    begin, saved, restored, exact, some, filled, drawn, gradient = BLOCKS
    page: dict = {}
    exec(begin, page)
    model = page["model"]
    moved = jax.tree.map(lambda x: x + 0.3, nnx.state(model, AdapterParam))
    nnx.update(model, moved)

    exec(saved, page)
    exec(restored, page)
    same(page["again"], model)
    assert page["told"] == model.randlora_settings()

    exec(exact, page)
    (gone_on, _), (trained, _) = page["gone_on"], page["trained"]
    same(gone_on, trained, AdapterParam)
    once = page["making"]()
    page["step"](*once)
    once, twice = leaves(once[0], AdapterParam), leaves(trained, AdapterParam)
    assert any((one != two).any() for one, two in zip(once, twice, strict=True))

    before = nnx.clone(model)
    exec(some.split("some = ")[0], page)
    nnx.update(model, jax.tree.map(np.zeros_like, moved))
    exec("some = " + some.split("some = ")[1], page)
    same(model, before, nnx.PathContains("hidden"))
    out = nnx.All(AdapterParam, nnx.PathContains("out"))
    assert len(leaves(model, out)) == 2 and not any(map(np.any, leaves(model, out)))
    nnx.update(model, moved)

    expected = model(X)
    for block, name in ((filled, "filled"), (drawn, "drawn")):
        exec(block, page)
        found = page[name]
        same(found, model)
        np.testing.assert_allclose(found(X), expected, rtol=1e-5, atol=1e-6)
        kernels = nnx.state(found, nnx.PathContains("base_layer"))
        cuts = {tuple(x.sharding.spec) for x in jax.tree.leaves(kernels) if x.ndim == 2}
        assert cuts == {("data",)}
        assert all(x.sharding.is_fully_replicated for x in leaves(found, AdapterParam))

    exec(gradient, page)
    assert len(jax.tree.leaves(page["grads"])) == len(leaves(model, AdapterParam))


if __name__ == "__main__":
    main()
