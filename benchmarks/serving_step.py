"""What a step of the server costs: 16 rows of one adapter and of 16, taken in turn.

    .venv/bin/python benchmarks/serving_step.py    # after `make demo-serve`, whose adapters it has

Every contestant says one more token in each of 16 rows of SmolLM2-135M. "Opened alone" is the model
with `set_adapter`, all rows alike, as it runs without adapters by row.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import smollm
from flax import nnx
from rich.console import Console
from rich.table import Table
from serve import SIZES
from serving_shelf import adapters_in
from serving_steps import Steps
from training import track

from randlora_jax import RandLoraModel

ADAPTERS = Path("out/serve/adapters")
TURNS, STEPS = 7, 4


class Bare(nnx.Module):
    """A model without adapters, called as one that has them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, adapter_names: None) -> Any:
        """As the model."""
        return self.model(*args)


def contestants() -> dict[str, Callable[[], object]]:
    """One step of each, compiled."""
    names = adapters_in(ADAPTERS)[:16]
    model = RandLoraModel.from_pretrained(smollm.tunix_base(), ADAPTERS / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(ADAPTERS / name, name)
    model.stack_adapters(16)
    model.set_adapter(names[0])
    steps = Steps(model, SIZES)
    slots = [int(slot) for slot in model.rows(names)]
    tokens, counts = [0] * 16, [40] * 16
    bare = Steps(Bare(smollm.tunix_base()), SIZES)
    found: dict[str, Callable[[], object]] = {
        "the base model": lambda: bare.step(tokens, counts, None),
        "one adapter, opened alone": lambda: steps.step(tokens, counts, None),
        "by row, one adapter": lambda: steps.step(tokens, counts, slots[:1] * 16),
        "by row, 4 adapters": lambda: steps.step(tokens, counts, slots[:4] * 4),
        "by row, 16 adapters": lambda: steps.step(tokens, counts, slots),
    }
    for step in track(found.values(), "compiling", len(found)):
        step()
    return found


def main() -> None:
    """Takes turns, and prints medians."""
    found = contestants()
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in track(range(TURNS), "turns", TURNS):
        for name, step in found.items():
            for _ in range(STEPS):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
    table = Table("16 rows", "ms a step", "tokens a second, of one adapter by row")
    one = statistics.median(seconds["by row, one adapter"])
    for name, each in seconds.items():
        median = statistics.median(each)
        table.add_row(name, f"{1000 * median:.0f}", f"{one / median:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
