"""The two pictures of the demo."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def curves(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss and held-back accuracy against steps, all runs in one pair of axes.

    Args:
      runs: name -> "losses" of each step, "accuracies" after the steps of "checked_at", and
        "test_accuracy".
    """
    figure = Figure(figsize=(7, 3.6))
    losses, accuracies = figure.subplots(1, 2)
    for name, run in runs.items():
        draw_losses(losses, run["losses"], look(name))
        label = f"{name}: {run['test_accuracy']:.3f}"
        accuracies.plot(run["checked_at"], run["accuracies"], label=label, **look(name))
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    accuracies.set(xlabel="step", ylabel="accuracy", title="Held-back documents", ylim=(0, 1))
    style.legend_above(figure, accuracies, columns=3, title="accuracy on the test split")
    return figure


def look(name: str) -> dict[str, str]:
    """The style's, but two runs of one method differ."""
    return style.look(name) | ({"linestyle": "--"} if "same rates" in name else {})


def draw_losses(
    axes: Axes, losses: Sequence[float], look: Mapping[str, Any], width: int = 15
) -> None:
    """The loss of every step, faint, and their mean over a window of `width`."""
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=look["color"], alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(np.array(losses), width), **{**look, "marker": ""})


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a window of `width` steps, narrower at both ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def changes(deltas: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> Figure:
    """Frobenius norm of delta_W for each layer of the encoder (rows) and kind (columns).

    Args:
      kinds: the end of a layer's name -> what to call that kind, in the order to draw them.
    """
    depth = len(deltas) // len(kinds)
    norms = np.array(
        [
            [np.linalg.norm(deltas[f"bert.encoder.layer.{layer}.{kind}"]) for kind in kinds]
            for layer in range(depth)
        ]
    )
    figure = Figure()
    axes = figure.subplots()
    draw_norms(figure, axes, norms, "What the adapter changed: norm of ΔW")
    for (row, column), norm in np.ndenumerate(norms):
        colour = "white" if norm > 0.6 * norms.max() else "black"
        axes.text(column, row, f"{norm:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(kinds)), kinds.values())
    axes.set_yticks(range(depth))
    axes.set(ylabel="layer")
    return figure


def draw_norms(figure: Figure, axes: Axes, norms: np.ndarray, title: str) -> None:
    """A map of norms, and what its colours say."""
    image = axes.imshow(norms, vmin=0, aspect="auto")
    axes.set(title=title)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Frobenius norm").outline.set_visible(False)
