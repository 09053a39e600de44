"""docs/trainers.md shows lines of what is run, in their order."""

import re
from pathlib import Path

import pytest
from usages import fences

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/trainers.md").read_text()


QUOTED = {
    "Fine-tuning": "examples/with_tunix.py",
    "A quantised base": "examples/with_tunix_quantised.py",
    "Preferences": "examples/with_tunix_dpo.py",
    "Reinforcement learning": "examples/with_tunix_grpo.py",
    "Sampling": "tests/trainers/test_sampler.py",
    "Sampling, an adapter for each prompt": "tests/trainers/test_sampler_rows.py",
}


@pytest.mark.parametrize(("heading", "source"), QUOTED.items())
def test_it_quotes_what_is_run(heading, source):
    section = PAGE.split(f"### {heading}\n")[1].split("\n#")[0]
    (shown,) = re.findall("```python\n(.*?)```", section, re.DOTALL)
    lines = map(str.strip, (ROOT / source).read_text().splitlines())
    for line in shown.splitlines():
        assert line in lines, f"{source} has no such line, here: {line}"


def test_every_fence_is_one_of_these_or_the_first():
    assert len(fences(ROOT / "docs/trainers.md")) == 1 + len(QUOTED)  # `tests/usages.py` has it
