"""The two pictures of the demo."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training import Curve

COLOURS = ("#0b6e99", "#d9730d", "#8a8a8a")


def curves(runs: Mapping[str, tuple[Curve, float]], path: Path) -> None:
    """Loss and held-back accuracy against steps, all runs in one pair of axes.

    Args:
      runs: name -> (curve, accuracy on the test split, for the legend).
    """
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (name, (run, final)) in zip(COLOURS, runs.items(), strict=True):
        draw_losses(losses, run.losses, colour)
        label = f"{name}: {final:.3f} on the test split"
        draw_checks(accuracies, run.checked_at, run.accuracies, colour, label)
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    accuracies.set(xlabel="step", ylabel="accuracy", title="Held-back documents", ylim=(0, 1))
    accuracies.legend(loc="lower right", frameon=False)
    finish(figure, (losses, accuracies), path)


def draw_losses(axes: Axes, losses: Sequence[float], colour: str, width: int = 15) -> None:
    """The loss of every step, faint, and their mean over a window of `width`."""
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(np.array(losses), width), color=colour, linewidth=2)


def draw_checks(
    axes: Axes, steps: Sequence[int], found: Sequence[float], colour: str, label: str
) -> None:
    """What was found on held-back documents after some of the steps."""
    axes.plot(steps, found, color=colour, linewidth=2, marker="o", markersize=4, label=label)


def finish(figure: Figure, both: Iterable[Axes], path: Path) -> None:
    """Light lines and no frame around curves; the picture is written and let go."""
    for axes in both:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a window of `width` steps, narrower at both ends."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def changes(deltas: Mapping[str, np.ndarray], kinds: Mapping[str, str], path: Path) -> None:
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
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    image = axes.imshow(norms, cmap="Blues", vmin=0, aspect="auto")
    for (row, column), norm in np.ndenumerate(norms):
        colour = "white" if norm > 0.6 * norms.max() else "black"
        axes.text(column, row, f"{norm:.1f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(kinds)), kinds.values())
    axes.set_yticks(range(depth))
    axes.set(ylabel="layer", title="What the adapter changed: norm of ΔW")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="Frobenius norm")
    figure.savefig(path, dpi=150)
    plt.close(figure)
