"""The two pictures of the language model's demonstration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import measured
import numpy as np
import style
from matplotlib.figure import Figure
from plots import draw_losses, draw_norms

if TYPE_CHECKING:  # it brings tunix along, which pictures of kept numbers do not need
    from tuning import Curve

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def curves(runs: Mapping[str, Curve]) -> Figure:
    """The loss of each run on what it is trained on, and on held-back documents.

    Args:
      runs: what the legend says of a run -> the run.
    """
    figure = Figure()
    losses, held = figure.subplots(1, 2)
    for name, run in runs.items():
        look = style.look(name)
        draw_losses(losses, run.losses, look, width=7)
        held.plot(list(run.held_losses), list(run.held_losses.values()), label=name, **look)
    losses.set(xlabel="step", ylabel="cross-entropy", title="Training loss")
    held.set(xlabel="step", ylabel="cross-entropy", title="Held-back documents")
    style.legend_above(figure, held, columns=2)
    return figure


def placed(deltas: Mapping[str, np.ndarray]) -> dict[tuple[int, str], np.ndarray]:
    """The changes by (layer, kind) instead of by name."""
    found = {name: re.search(r"layers\D(\d+)\D.*?(\w+_proj)", name) for name in deltas}
    return {(int(m[1]), m[2].split(".")[-1]): deltas[name] for name, m in found.items() if m}


def changed(ours: Mapping[str, np.ndarray], lora: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How much each layer changed, and the spectra of one change.

    Returns:
      "norms": kind -> Frobenius norm of RandLoRA's delta_W in each layer; "layer": the middle one;
      "spectra": method -> the singular values of its MLP-down change, by the largest.
    """
    mine, theirs = placed(ours), placed(lora)
    depth = 1 + max(layer for layer, _ in mine)
    spectra = {}
    for name, deltas in {"RandLoRA": mine, "LoRA": theirs}.items():
        values = np.linalg.svd(deltas[depth // 2, "down_proj"], compute_uv=False)
        spectra[name] = measured.rounded(values / values[0])
    norms = {
        kind: measured.rounded([np.linalg.norm(mine[i, kind]) for i in range(depth)])
        for kind in KINDS
    }
    return {"norms": norms, "layer": depth // 2, "spectra": spectra}


def changes(found: Mapping[str, Any]) -> Figure:
    """Draws what `changed` found."""
    figure = Figure(figsize=(7, 5.2))
    map_, spectra = figure.subplots(2, 1)
    title = "What RandLoRA changed: norm of ΔW"
    draw_norms(figure, map_, np.array(list(found["norms"].values())), title)
    map_.set_yticks(range(len(found["norms"])), found["norms"])
    map_.set(xlabel="layer")
    for name, values in found["spectra"].items():
        shown = [value for value in values if value > 1e-6]
        look = {**style.look(name), "marker": ""}
        spectra.plot(np.arange(1, len(shown) + 1), shown, label=name, **look)
    spectra.set(
        xlabel="singular value",
        ylabel="share of the largest",
        title=f"Spectrum of ΔW, down_proj of layer {found['layer']}",
        xscale="log",
        yscale="log",
    )
    spectra.legend()
    return figure
