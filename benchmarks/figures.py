"""Draws the pictures of docs/ again, of what docs/figures/ keeps.

    make figures      seconds; nothing is measured

A picture whose numbers are to be new is measured by its own command, which writes them to out/;
from there they are copied to docs/figures/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drawings
import measured
import pictures
import plots
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Source:
    """Where a picture comes from: `make` what, where that writes its numbers, who draws them."""

    make: str
    numbers: str
    drawing: Callable[..., Figure]


FIGURES = {
    "bench.png": Source("bench", "out/bench/bench.json", drawings.bench),
    "compare.png": Source("compare", "out/compare/compare.json", drawings.compare),
    "demo-curves.png": Source("demo", "out/demo/demo-curves.json", plots.curves),
    "demo-llm.png": Source("demo-llm", "out/demo-llm/demo-llm.json", pictures.changes),
    "fit.png": Source("fit", "out/fit/fit.json", drawings.fit),
    "low-precision.png": Source(
        "low-precision", "out/low_precision/low-precision.json", drawings.low_precision
    ),
}
BY_HAND = {"arithmetic.svg"}  # is its own source


def main() -> None:
    """Every picture whose numbers are kept; the others are named."""
    for name, source in FIGURES.items():
        kept = DOCS / "figures" / Path(source.numbers).name
        if kept.exists():
            measured.draw(source.drawing, kept, DOCS / name)
            print(f"{DOCS / name}")
        else:
            print(
                f"{DOCS / name} stays: its numbers are not kept; "
                f"`make {source.make} && cp {source.numbers} docs/figures/` measures them"
            )


if __name__ == "__main__":
    main()
