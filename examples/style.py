"""How our pictures look: docs/matplotlibrc, and each method alike in all of them.

Colour says the method, whoever runs it. What PyTorch runs is hollow or dotted.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = Path(__file__).parents[1] / "docs" / "matplotlibrc"

# words in a name -> the look of what is called so; the first that are found count
LOOKS = {
    r"float32|the matrix": {"color": "#222222", "linestyle": "--"},  # what others should reach
    r"factored": {"color": "#5fb3d4", "linestyle": "--", "marker": "o"},  # RandLoRA, by its ways
    r"merged|rounded": {"color": "#063f58", "linestyle": "-.", "marker": "o"},
    r"RandLoRA|ours|beside": {"color": "#0b6e99", "linestyle": "-", "marker": "o"},
    r"LoRA": {"color": "#d9730d", "linestyle": "-", "marker": "s"},
    r"VeRA": {"color": "#2ca25f", "linestyle": "-", "marker": "^"},
    r"full|everything": {"color": "#222222", "linestyle": "-", "marker": "D"},
    r"head": {"color": "#8a8a8a", "linestyle": "-", "marker": "v"},
}


def look(name: str) -> dict[str, str]:
    """Colour, line and marker of what is called `name`.

    Raises:
      ValueError: the name says no method.
    """
    for words, found in LOOKS.items():
        if re.search(words, name):
            hollow = {"markerfacecolor": "white", "linestyle": ":"}
            return found | hollow if in_torch(name) else dict(found)
    raise ValueError(f"{name!r}: expected a name with one of {', '.join(LOOKS)} in it")


def in_torch(name: str) -> bool:
    """Whether a name says that PyTorch runs it."""
    return re.search("PEFT|PyTorch", name) is not None


def bar(name: str) -> dict[str, str]:
    """The look of a bar for what is called `name`."""
    colour = look(name)["color"]
    return {"color": "white" if in_torch(name) else colour, "edgecolor": colour}


def legend_above(figure: Figure, axes: Axes, columns: int, title: str | None = None) -> None:
    """One legend for all axes of a figure: what `axes` has labels of."""
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=columns, title=title)


def picture(drawing: Callable[..., Figure], path: Path, *measured: Any, below: str = "") -> None:
    """Draws what was measured in our style, with a small line below it, into a file."""
    with matplotlib.rc_context(fname=STYLE):
        figure = drawing(*measured)
        if below:
            figure.supxlabel(below, x=0.995, ha="right", fontsize=6.5, color="#666666")
        figure.savefig(path)
