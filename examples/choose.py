"""How the demo's settings were chosen: one run for each row, judged on the held-back documents.

`python examples/demo.py --select` prints this table afresh.
"""

import dataclasses
from typing import Any

import bert
import reuters
from rich.console import Console
from rich.table import Table
from training import Settings, fit

from randlora_jax import RandLoraConfig, get_peft_model

RATES = (1e-3, 2e-3, 4e-3, 1e-2)
HEAD_RATES = (*RATES, 3e-2, 1e-1, 3e-1, 1.0)
OTHER = ((32, 2, 2e-3), (16, 20, 2e-3), (16, 20, 2e-4))  # r, alpha / r, rate


def main(
    base: Any, config: RandLoraConfig, train: reuters.Documents, held: reuters.Documents
) -> None:
    """Trains with every setting in turn and prints the table."""
    table = Table("run", title="Accuracy on the held-back documents")
    for column in ("r", "alpha / r", "learning rate", "trained numbers", "last loss", "accuracy"):
        table.add_column(column, justify="right")

    seen = bert.features(base, train, "features to train on")
    seen_held = bert.features(base, held, "features, held back")
    for rate in HEAD_RATES:
        start = base.params["classifier"]
        head, title = bert.head(base.config), f"head alone, {rate:g}"
        _, curve = fit(head, start, {}, seen, seen_held, Settings(rate), title)
        size = sum(leaf.size for leaf in start.values())
        table.add_row("head alone", "", "", f"{rate:g}", f"{size:,}", *outcome(curve))

    ratio = config.randlora_alpha // config.r
    mine = [(config.r, ratio, rate) for rate in RATES]
    for r, scale, rate in (*mine, *OTHER):
        model: Any = get_peft_model(
            base, dataclasses.replace(config, r=r, randlora_alpha=scale * r)
        )
        trained, frozen = model.split()
        title = f"r {r}, alpha / r {scale}, {rate:g}"
        _, curve = fit(
            bert.adapted(model), trained, frozen, train, held, Settings(rate), title, checks=1
        )
        size = model.get_nb_trainable_parameters()[0]
        row = (str(r), str(scale), f"{rate:g}", f"{size:,}", *outcome(curve))
        table.add_row("RandLoRA", *row)
        print(f"{title}: last loss, accuracy {row[-2:]}", flush=True)  # a stopped run keeps these
    Console().print(table)


def outcome(curve: Any) -> tuple[str, str]:
    """Mean loss of the last 20 steps and held-back accuracy at the end."""
    return f"{sum(curve.losses[-20:]) / 20:.3f}", f"{curve.accuracies[-1]:.4f}"
