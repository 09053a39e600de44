"""What a training step of MiniLM costs, by what does not wobble: operations and bytes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from contestants import jax_full, jax_lora, ours
from shapes import minilm

pytestmark = pytest.mark.torch


@pytest.mark.first
def test_operations_and_temporary_bytes():
    """32 x 128 tokens, every linear layer, r 32; compiled, not run: a minute, so once for both."""
    shape = minilm()
    tokens = shape.tokens(32, 128)
    builders = [jax_lora, jax_full, ours("auto"), ours("factored")]
    steps = {one.name: one for one in (build(shape, tokens) for build in builders)}
    auto = steps["ours, auto"]
    print({name: f"{one.flops / 1e9:.1f} GFLOP" for name, one in steps.items()})
    assert auto.flops <= 301e9
    assert auto.flops <= 1.08 * steps["JAX full"].flops
    assert auto.flops <= 0.65 * steps["ours, factored"].flops
    print({name: f"{one.temporary / 2**20:.0f} MiB" for name, one in steps.items()})
    assert auto.temporary <= steps["JAX LoRA (qwix)"].temporary
