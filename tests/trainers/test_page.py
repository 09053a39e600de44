"""docs/trainers.md shows lines of what is run, in their order."""

import re
from pathlib import Path

import pytest
from usages import fences

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trainers.md").read_text()


QUOTED = {
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
        **sizes, num_kv_heads=2, vocab_size=len(TOKENIZER), rope_theta=10_000, norm_eps=1e-5
    )
    config = RandLoraConfig(r=8, target_modules="all-linear", init_weights=False)
    for seed, name in enumerate("ab"):
        model = get_peft_model(llama3.Llama3(shape, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(seed))
        model.save_pretrained(f"adapter-{name}")
    has = {"model": model, "tokenizer": TOKENIZER, "prompts": ["one", "two", "one"]}
    has |= {"base": llama3.Llama3(shape, rngs=nnx.Rngs(0)), "TrainingConfig": TrainingConfig}
    for fence in PASTED:
        exec(fence, has)
    b_alone, by_row = map(eval, capsys.readouterr().out.splitlines())
    assert by_row[1] == b_alone[1] and by_row[0] != b_alone[0] and by_row[2] != by_row[0]
    assert has["training"].checkpoint_root_directory


def test_every_fence_is_one_of_these_or_the_first():
    assert len(fences(ROOT / "docs/trainers.md")) == 1 + len(QUOTED) + len(
        PASTED
    )  # `tests/usages.py` has it
