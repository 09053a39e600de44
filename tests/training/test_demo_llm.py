"""`make demo-llm` with a few steps and prompts: the real model, its trainer, PyTorch PEFT."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]


def test_a_language_model_says_the_same_words_in_pytorch():
    command = [sys.executable, "-W", "ignore", "examples/demo_llm.py", "--short"]
    subprocess.run(command, cwd=ROOT, check=True)
    found = json.loads((ROOT / "out/demo-llm-short/report.json").read_text())
    losses, said = found["losses"], found["in_pytorch"]
    assert losses[-1] < losses[0], "nothing was learned"
    assert found["untouched_logit_difference"] <= 1e-5 * found["largest_logit"]
    for way in ("PEFT", "merged"):
        assert said[way]["logit_difference"] <= 1e-4, way
        assert said[way]["same_words"] == found["prompts"], way
        assert said[way]["test_accuracy"] == found["test_accuracy"], way
    assert said["to-lora, rank 64"]["logit_difference"] > 1e-4, (
        "LoRA loses something, but it shows not"
    )
    assert found["peft_adapter_bytes"] >= 40 * found["adapter_bytes"]
