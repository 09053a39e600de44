"""docs/quantised.md runs as it stands, block by block."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("qwix")

PAGE = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs_as_it_stands(capsys):
    page = {}
    first, mine, packed, empty = BLOCKS
    exec(first, page)
    numbers = 2 * 64 * 128
    assert page["model"].memory().base == numbers / 2 + 4 * numbers / 32 + 4 * (128 + 64)
    assert "KiB" in capsys.readouterr().out
    exec(mine, page)
    kernel = page["mine"].merge_and_unload(dequantize=True).layers[0].weights
    assert kernel.shape == (64, 32) and kernel.dtype == jnp.float32
    exec(packed, page)
    assert "(64 -> 32)" in (said := capsys.readouterr().out) and "is packed into uint32" in said
    kernel = (page["codes"] - 8) * 0.1
    np.testing.assert_allclose(page["packed"](X), X @ kernel, rtol=1e-5, atol=1e-4)
    exec(empty, page)
    np.testing.assert_array_equal(page["empty"](X), page["model"](X))
