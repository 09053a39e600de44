"""The guides' first usages run as they are pasted."""

from pathlib import Path

import pytest
from installed import Environment, run
from named_models import SMALL_QWEN3
from usages import USAGES


def pasted(name: str, installed: Environment, folder: Path, before: str = "") -> list[str]:
    """The lines that a usage prints, run after what is set `before`."""
    (folder / "pasted.py").write_text(before + USAGES[name])
    return run(installed.python, "pasted.py", cwd=folder).splitlines()


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_it_trains_and_saves(name, installed, tmp_path):
    losses = [float(line) for line in pasted(name, installed, tmp_path)]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.torch
@pytest.mark.usefixtures("my_bert")
def test_hugging_face_trains_and_saves_what_pytorch_opens(installed, tmp_path):
    import peft
    import transformers

    (said,) = pasted("hugging_face", installed, tmp_path)
    assert said.startswith("trainable params: ")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "my-bert")
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    moved = [p.abs().max() for name, p in opened.named_parameters() if "randlora_lambda" in name]
    assert len(moved) == 13 and all(value > 0 for value in moved)


@pytest.mark.torch
@pytest.mark.usefixtures("my_qwen3")
def test_a_language_model_trains_and_saves_what_pytorch_opens(installed, tmp_path, monkeypatch):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import Qwen3ForCausalLM

    monkeypatch.chdir(tmp_path)
    base = Qwen3ForCausalLM.from_pretrained("my-qwen3")
    pasted("tunix", installed, tmp_path, SMALL_QWEN3)

    tokens = torch.arange(8 * 64).reshape(8, 64) % 100
    tuned = AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.float32)
    with torch.no_grad():
        costs = [float(model(tokens, labels=tokens).loss) for model in (base, tuned)]
    assert costs[1] < 0.9 * costs[0]
