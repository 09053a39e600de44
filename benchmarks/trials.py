"""A way to fine-tune, one training of it, and the search for its learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
      start: of (base model, seed), what is trained.
      rate: the learning rate with which the search begins.
      head_rate: likewise that of a new head, where there is one beside other trained numbers.
    """

    start: Callable[[Any, int], Any]
    rate: float
    head_rate: float | None = None


@dataclass(frozen=True)
class Trial:
    """One training: judged on the held-back documents, or on the test documents."""

    rate: float
    head_rate: float | None = None
    seed: int = 0
    held: bool = True

    def __str__(self) -> str:
        head = "" if self.head_rate is None else f", head {self.head_rate:g}"
        return f"{self.rate:g}{head}, {'held back' if self.held else f'test, seed {self.seed}'}"


@dataclass(frozen=True)
class Result:
    """What a training reached: `losses` are means over each tenth of its steps."""

    accuracy: float
    trained: int
    losses: Sequence[float]


def tenths(losses: Sequence[float]) -> list[float]:
    """Means over each tenth of a run."""
    return [float(part.mean()) for part in np.array_split(np.array(losses), 10)]


def climb(reached: Callable[[Trial], float], begin: Trial) -> Trial:
    """The trial whose neighbours are no better: rates in steps of two, those of heads of four."""
    best, factors = begin, {"rate": (2.0, 0.5), "head_rate": (4.0, 0.25)}
    if begin.head_rate is None:
        del factors["head_rate"]
    while True:
        around = [
            replace(best, **{name: getattr(best, name) * factor})
            for name, both in factors.items()
            for factor in both
        ]
        top = max(around, key=reached)
        if reached(top) <= reached(best):
            return best
        best = top
