"""`make demo-llm` with a few steps and prompts: the real model, its trainer, PyTorch PEFT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


@pytest.mark.first
def test_a_language_model_says_the_same_words_in_pytorch():
    command = [sys.executable, "-W", "ignore", "examples/demo_llm.py", "--short"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((ROOT / "out/demo-llm-short/report.json").read_text())
    losses, said = found["losses"], found["in_pytorch"]["PEFT"]
    assert losses[-1] < losses[0], "nothing was learned"
    assert found["moved_by"] > 0.1, "the adapter hardly does anything"
    assert found["untouched_logit_difference"] <= 1e-5 * found["largest_logit"]
    assert said["logit_difference"] <= 1e-5 * found["largest_logit"]
    assert said["same_words"] == found["prompts"]
    assert said["other_topics"] == 0
