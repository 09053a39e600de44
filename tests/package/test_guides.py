"""Every fence of Python in docs/ runs: those of these guides here, others in tests of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from usages import PAGES, fences

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# What a guide takes from the reader.
BEFORE = {
    "peft-differences": """
import jax
import jax.numpy as jnp
from flax import nnx
from randlora_jax import RandLoraConfig, get_peft_model

net = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
config = RandLoraConfig(r=4, target_modules="all-linear", init_weights=False)
model, x = get_peft_model(net, config, rngs=nnx.Rngs(1)), jnp.ones((1, 8))
""",
}
# What must have come of it.
AFTER = {
    "nnx": "assert type(merged) is nnx.Sequential and model",
    "peft": "assert again.active_adapters == ['default']",
    "peft-differences": """
adapted = model(x)
with model.disable_adapter():
    assert abs(model(x) - adapted).max() > 1e-3 * abs(adapted).max()
    assert abs(run(x) - adapted).max() < 1e-5 * abs(adapted).max()
""",
    "design": "assert list(model.delta_weights()) == ['layers.0']",
    "torch-generations": "assert A.shape == (32, 1, 384) and B.shape == (1536, 12, 32)",
    "other-libraries": """
untrained = apply({"up": {"w": up, "b": 0}, "down": {"w": down}}, x)
assert value < 0.8 * ((untrained - 0.5 * x) ** 2).mean() and logits.shape == (16, 2)
""",
    "low-precision": "assert model.memory().adapters == 2 * held.memory().adapters",
    "merge": """
assert abs(adapted - merged).max() < 1e-5 * abs(adapted).max()
assert abs(net(x) - adapted).max() < 1e-5 * abs(adapted).max()
""",
    "export": "assert 'adapter_model.safetensors' in __import__('os').listdir('adapter')",
    "verify": "assert deltas['layers.0'].shape == (32, 8)",
    "mesh": """
assert losses[-1] < losses[0] and len(jax.devices()) == 4
kernel = model.model.layers[0].base_layer.kernel[...]
assert kernel.addressable_shards[0].data.shape == (16, 256)
""",
}
NEEDS = {"export": "peft", "other-libraries": "equinox"}
# Pages that another test runs: which, and how many fences it has of each.
ELSEWHERE = {
    "checkpoints": ("tests/checkpoints_page.py", 8),
    "choosing": ("tests/training/test_choosing_page.py", 1),
    "files": ("tests/commands/test_files_page.py", 1),
    "format": ("tests/interop/test_format_page.py", 1),
    "hugging-face": ("tests/usages.py", 1),
    "linen": ("tests/usages.py", 1),
    "many-adapters": ("tests/front_ends/test_many_adapters_page.py", 5),
    "maxtext": ("tests/code_bases/test_maxtext_page.py", 1),
    "quantised": ("tests/front_ends/test_quantised_page.py", 4),
    "scale": ("tests/training/test_scale.py", 1),
    "trainers": ("tests/trainers/test_page.py", 13),
}


@pytest.mark.parametrize("page", sorted(AFTER))
def test_it_runs_as_it_stands(page, tmp_path, monkeypatch):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    text = "\n".join([BEFORE.get(page, ""), *fences(DOCS / f"{page}.md"), AFTER[page]])
    monkeypatch.chdir(tmp_path)
    if page != "mesh":
        exec(text, {})
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_no_page_is_left_out():
    """A new page or a new fence is run by a test, or fails here."""
    found = {page.stem: len(fences(page)) for page in DOCS.glob("*.md") if fences(page)}
    assert found.keys() == AFTER.keys() | ELSEWHERE.keys()
    for page, (test, count) in ELSEWHERE.items():
        assert found[page] == count, f"docs/{page}.md has other fences than {test} runs"
        text = (ROOT / test).read_text()
        assert f"docs/{page}.md" in text or f'"{page}.md"' in text or page in PAGES.values()


def test_python_is_fenced_in_one_way():
    """So that none is passed over above: from the line's start, and by this name."""
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        text = page.read_text()
        told = re.findall(r"^[ \t>]*(?:```|~~~)[ \t]*\{?([\w-]+)", text, flags=re.MULTILINE)
        assert told.count("python") == len(fences(page)), page
        known = {"python", "text", "sh", "json", "include", "toctree", "eval-rst", "code-cell"}
        assert set(told) <= known, page
