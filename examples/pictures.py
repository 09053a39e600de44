"""The two pictures of the language model's demonstration."""

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from plots import COLOURS, draw_checks, draw_losses, finish
from tuning import Curve

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def curves(runs: Mapping[str, Curve], path: Path) -> None:
    """The loss of each run on what it is trained on, and on held-back documents.

    Args:
      runs: what the legend says of a run -> the run.
    """
    figure, (losses, held) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for colour, (name, run) in zip(COLOURS, runs.items(), strict=False):
        draw_losses(losses, run.losses, colour, width=7)
        draw_checks(held, list(run.held_losses), list(run.held_losses.values()), colour, name)
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    held.set(xlabel="step", ylabel="cross-entropy", title="Held-back documents")
    held.legend(loc="upper right", frameon=False)
    finish(figure, (losses, held), path)


def placed(deltas: Mapping[str, np.ndarray]) -> dict[tuple[int, str], np.ndarray]:
    """The changes by (layer, kind) instead of by name."""
    found = {name: re.search(r"layers\D(\d+)\D.*?(\w+_proj)", name) for name in deltas}
    return {(int(m[1]), m[2].split(".")[-1]): deltas[name] for name, m in found.items() if m}


def changes(
    ours: Mapping[str, np.ndarray], lora: Mapping[str, np.ndarray], path: Path
) -> dict[str, int]:
    """Draws how much each layer changed, and the singular values of what changed beside LoRA's.

    Returns:
      for each method, how many singular values of the middle layer's MLP-down change are at least
      a hundredth of the largest.
    """
    mine, theirs = placed(ours), placed(lora)
    depth = 1 + max(layer for layer, _ in mine)
    norms = np.array([[np.linalg.norm(mine[i, kind]) for i in range(depth)] for kind in KINDS])
    figure, (map_, spectra) = plt.subplots(
        1, 2, figsize=(13, 4), width_ratios=(3, 2), layout="constrained"
    )
    image = map_.imshow(norms, cmap="Blues", vmin=0, aspect="auto")
    map_.set_yticks(range(len(KINDS)), KINDS)
    map_.set(xlabel="layer", title="What RandLoRA changed: norm of ΔW")
    map_.spines[:].set_visible(False)
    figure.colorbar(image, ax=map_, label="Frobenius norm")

    ranks = {}
    for colour, (name, changed) in zip(
        COLOURS, {"RandLoRA": mine, "LoRA": theirs}.items(), strict=False
    ):
        values = np.linalg.svd(changed[depth // 2, "down_proj"], compute_uv=False)
        values = values / values[0]
        ranks[name] = int((values >= 0.01).sum())
        shown = values[values > 1e-6]
        spectra.plot(np.arange(1, len(shown) + 1), shown, color=colour, linewidth=2, label=name)
    spectra.set(
        xlabel="singular value",
        ylabel="share of the largest",
        title=f"Spectrum of ΔW, down_proj of layer {depth // 2}",
        xscale="log",
        yscale="log",
    )
    spectra.legend(frameon=False)
    spectra.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return ranks
