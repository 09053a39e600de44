"""`make demo-serve` with few words: the real model, a real server, real requests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_each_answer_is_what_its_adapter_says_alone():
    command = [sys.executable, "-W", "ignore", "examples/demo_serve.py", "--short"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((ROOT / "out/serve/report.json").read_text())
    assert found["same_alone"] == found["answers"] > 0
    assert found["same_by_set_adapter"] == found["different"] > 0
    assert found["status"]["compiled"] == 0
    assert found["status"]["evicted"] > 0
    assert all(400 <= status < 500 for status, _ in found["refused"].values())
