"""The training step of each example that has one lowers for GPU and TPU, without either."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
LOOPS = [path.name for path in (ROOT / "examples").glob("with_*.py")]
EXAMPLES = sorted(name for name in LOOPS if "tunix" not in name)  # whose trainers have the step
QUICK = ("with_linen.py", "with_nnx.py")  # the two ways to run layers that all of them take
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in EXAMPLES]


@pytest.mark.parametrize("name", CASES)
def test_the_step_lowers_for_accelerators(name, tmp_path):
    python = sys.executable
    done = subprocess.run(
        [python, "-W", "ignore", ROOT / "tests" / "lowered.py", ROOT / "examples" / name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and "lowered for cuda, tpu" in done.stdout, done.stderr[-3000:]
