"""How the settings of the language model's demonstration were chosen: one run for each row.

`python examples/demo_llm.py --select` prints this table afresh; a stopped one goes on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import smollm
import tuning
from rich.console import Console
from rich.table import Table

from randlora_jax import RandLoraConfig, get_peft_model

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
OTHER = ((2, 5e-4), (6, 1e-3), (6, 2e-3), (20, 5e-4))  # alpha / r, rate
HELD = 256
KEPT = Path("out/demo-llm-choice.json")


def main(task: Any, config: RandLoraConfig) -> None:
    """Trains with every setting in turn and prints the table."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    ratio = config.randlora_alpha // config.r
    runs: list[tuple[str, float, float]] = [("LoRA", 2, rate) for rate in RATES]
    runs += [
        ("RandLoRA", scale, rate) for scale, rate in [(ratio, r) for r in RATES[1:]] + [*OTHER]
    ]
    table = Table(title=f"Accuracy on {HELD} held-back documents")
    for column in ("method", "alpha / r", "learning rate", "last loss", "accuracy"):
        table.add_column(column, justify="right")
    for method, scale, rate in runs:
        name = f"{method}, alpha / r {scale:g}, {rate:g}"
        if name not in kept:
            kept[name] = outcome(task, config, method, scale, rate, name)
            KEPT.write_text(json.dumps(kept, indent=2) + "\n")
        loss, accuracy = kept[name]
        table.add_row(method, f"{scale:g}", f"{rate:g}", f"{loss:.3f}", f"{accuracy:.4f}")
    Console().print(table)


def outcome(
    task: Any, config: RandLoraConfig, method: str, scale: float, rate: float, name: str
) -> tuple[float, float]:
    """Mean loss of the last ten steps, and accuracy on the held-back documents."""
    base = smollm.tunix_base()
    scaled = dataclasses.replace(config, randlora_alpha=scale * config.r)
    model = tuning.lora(base) if method == "LoRA" else get_peft_model(base, scaled)
    curve = task.fit(model, name, rate, checks=0)
    held = task.held.take(np.arange(HELD))
    return sum(curve.losses[-10:]) / 10, task.accuracy(task.logits(model, name, held), held)
