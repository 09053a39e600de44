"""The two pictures of the demo."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from training import Curve

COLOURS = ("#0b6e99", "#d9730d", "#8a8a8a")


def curves(runs: Mapping[str, tuple[Curve, float]], path: Path) -> None:
    """Loss and held-back accuracy against steps, all runs in one pair of axes.

    Args:
      runs: name -> (curve, accuracy on the test split, for the legend).
    """
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (name, (run, final)) in zip(COLOURS, runs.items(), strict=True):
        steps = np.arange(1, len(run.losses) + 1)
        losses.plot(steps, run.losses, color=colour, alpha=0.25, linewidth=1)
        losses.plot(steps, smooth(np.array(run.losses)), color=colour, linewidth=2)
        accuracies.plot(
            run.checked_at,
            run.accuracies,
            color=colour,
            linewidth=2,
            marker="o",
            markersize=4,
            label=f"{name}: {final:.3f} on the test split",
        )
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss", ylim=(0, None))
    accuracies.set(xlabel="step", ylabel="accuracy", title="Held-back documents", ylim=(0, 1))
    accuracies.legend(loc="lower right", frameon=False)
    for axes in (losses, accuracies):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
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
