"""README.md's usages run as they are pasted."""

from pathlib import Path

import pytest
from installed import Environment, run
from readme import USAGES


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


@pytest.fixture
def my_bert(tmp_path):
    """A small model of PyTorch and its tokenizer, by the name that the usage has for them."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=8, intermediate_size=64, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "my-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "day"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(tmp_path / "vocab.txt").save_pretrained(tmp_path / "my-bert")


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


# The usage's model has 600 million numbers; here it is called by the same name.
SMALL = """
import functools
from tunix.models.qwen3 import model as qwen3

qwen3.ModelConfig.qwen3_0p6b = functools.partial(
    qwen3.ModelConfig, num_layers=2, vocab_size=128, embed_dim=96, hidden_dim=192, num_heads=4,
    head_dim=24, num_kv_heads=2, norm_eps=1e-6, rope_theta=1_000_000, use_tied_embedding=True,
)
"""


@pytest.mark.torch
def test_a_language_model_trains_and_saves_what_pytorch_opens(installed, tmp_path, monkeypatch):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import Qwen3Config, Qwen3ForCausalLM

    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 128, "hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    base.save_pretrained("my-qwen3")
    pasted("tunix", installed, tmp_path, SMALL)

    tokens = torch.arange(8 * 64).reshape(8, 64) % 100
    tuned = AutoPeftModelForCausalLM.from_pretrained("adapter", dtype=torch.float32)
    with torch.no_grad():
        costs = [float(model(tokens, labels=tokens).loss) for model in (base, tuned)]
    assert costs[1] < 0.9 * costs[0]
