"""docs/trainers.md shows lines of what is run, in their order."""

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from usages import fences

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trainers.md").read_text()


QUOTED = {
    "The same logits in PyTorch": "examples/with_tunix.py",
    "Fine-tuning": "examples/with_tunix.py",
    "Settings in its checkpoints": "tests/trainers/test_sft.py",
    "A quantised base": "examples/with_tunix_quantised.py",
    "Preferences": "examples/with_tunix_dpo.py",
    "Reinforcement learning": "examples/with_tunix_grpo.py",
    "Sampling": "tests/trainers/test_sampler.py",
    "Sampling, an adapter for each prompt": "tests/trainers/test_sampler_rows.py",
}


def blocks(text):
    return re.findall("```python\n(.*?)```", text, re.DOTALL)


# These run as they are pasted: `test_what_is_pasted_runs`.
PASTED = [x for x in blocks(PAGE)[1:] if re.match("from|import", x)]
(POSITIONS,) = (x for x in PASTED if "LlamaRotaryEmbedding" in x)


@pytest.mark.parametrize(("heading", "source"), QUOTED.items())
def test_it_quotes_what_is_run(heading, source):
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    shown, *_ = (x for x in blocks(section) if x not in PASTED)
    lines = map(str.strip, (ROOT / source).read_text().splitlines())
    for line in map(str.strip, shown.splitlines()):
        assert line in lines, f"{source} has no such line, here: {line}"


@pytest.mark.torch
def test_what_is_pasted_runs(tmp_path, monkeypatch, capsys):
    from flax import nnx
    from tiny_llama import TOKENIZER
    from tunix.models.llama3 import model as llama3
    from tunix.sft.peft_trainer import TrainingConfig

    from randlora_jax import RandLoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    sizes = {"num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4, "head_dim": 16}
    shape = llama3.ModelConfig(
        **sizes, num_kv_heads=2, vocab_size=len(TOKENIZER), rope_theta=1_000_000, norm_eps=1e-5
    )
    config = RandLoraConfig(r=8, target_modules="all-linear", init_weights=False)
    for seed, name in enumerate("ab"):
        model = get_peft_model(llama3.Llama3(shape, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(seed))
        model.save_pretrained(f"adapter-{name}")
    has = {"model": model, "tokenizer": TOKENIZER, "prompts": ["one", "two", "one"]}
    has |= {"base": llama3.Llama3(shape, rngs=nnx.Rngs(0)), "TrainingConfig": TrainingConfig}
    for fence in filter(lambda x: x != POSITIONS, PASTED):
        exec(fence, has)
    b_alone, by_row = map(eval, capsys.readouterr().out.splitlines())
    assert by_row[1] == b_alone[1] and by_row[0] != b_alone[0] and by_row[2] != by_row[0]
    assert has["training"].checkpoint_root_directory


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.torch
def test_positions_scaled_as_in_pytorch_are(tmp_path, monkeypatch):
    """Before, wrapping warns, and the logits are others."""
    import tiny_llama
    import transformers
    from tunix.models.llama3 import model as llama3
    from tunix_pair import jax_logits, torch_logits

    from randlora_jax import RandLoraConfig, get_peft_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama3, "apply_rope", llama3.apply_rope)
    scaling = SCALING | {"original_max_position_embeddings": 8}
    changes = tiny_llama.WIDTHS | {"rms_norm_eps": 1e-5}
    hf = tiny_llama.with_rope(transformers.LlamaConfig, 5e5, scaling, **changes)
    tiny_llama.checkpoint(Path("my-llama"), hf)
    shape = dataclasses.replace(tiny_llama.TUNIX, rope_theta=500_000)
    base = tiny_llama.base_model(Path("my-llama"), shape=shape)
    theirs = transformers.LlamaForCausalLM.from_pretrained("my-llama").eval()
    expected = torch_logits(theirs)
    config = RandLoraConfig(**tiny_llama.SETTINGS)

    def apart(model):
        return np.abs(np.asarray(jax_logits(model)) - expected).max() / np.abs(expected).max()

    with pytest.warns(UserWarning, match="rope_theta 500000 .its attention takes 1000000.*partial"):
        model = get_peft_model(base, config)
    assert apart(model) > 1e-3
    exec(POSITIONS, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(model.unload(), config)
    assert apart(model) < 1e-5


def test_every_fence_is_one_of_these_or_the_first():
    assert len(fences(ROOT / "docs/trainers.md")) == 1 + len(QUOTED) + len(
        PASTED
    )  # `tests/usages.py` has it
