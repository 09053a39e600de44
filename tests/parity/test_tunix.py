"""google-tunix's models, wrapped, trained and exported, against PyTorch PEFT on their twins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

# `make compat`: tunix as it installs itself
PYTHON = os.environ.get("TUNIX_PYTHON", sys.executable)
MODELS = [
    "qwen3",
    "gemma2_fused",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("llama3", "qwen2", "qwen3_moe", "gemma1", "gemma2", "gemma3", "gemma3_vision")
    ),
]

# What transformers 5, with which tunix installs itself, has no twin for.
ONLY_4 = {
    "qwen3_moe": "all experts are one tensor there, which PEFT's RandLoRA does not adapt",
    "gemma3_vision": "tunix's loader does not read what it saves",
}


def check(found: dict) -> None:
    """What `tunix_pair` found is right."""
    assert found["unchanged"] == 0, "wrapping changed the model"
    assert found["last_loss"] < found["first_loss"]
    for moved in ("ours_moves", "theirs_moves"):
        assert found[moved] >= 0.1, "the adapter hardly moves the logits"
    for logits in ("ours_in_peft", "theirs_here"):
        assert found[logits] <= found["allowed"], logits
    for delta in ("delta_ours_in_peft", "delta_theirs_here"):
        assert found[delta] <= 1e-6, delta


@pytest.mark.parametrize("model", MODELS)
def test_a_tunix_model_and_its_twin(model, tmp_path):
    if sys.executable != PYTHON and model in ONLY_4:
        pytest.skip(f"transformers 5: {ONLY_4[model]}")
    program = Path(__file__).parent.with_name("tunix_pair.py")
    command = [PYTHON, "-W", "ignore", str(program), model, str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(found)
    check(found)
