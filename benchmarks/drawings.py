"""The pictures of the benchmarks: of what each measured, as docs/figures/ keeps it."""

from __future__ import annotations

from typing import Any

import numpy as np
import style
from matplotlib.figure import Figure

Numbers = dict[str, Any]


def bench(found: Numbers) -> Figure:
    """Seconds a step for each model, and along the sweep.

    Args:
      found: "models": model -> contestant -> seconds; "sweep": contestant -> tokens -> seconds.
    """
    figure = Figure(figsize=(7, 5.6))
    *models, sweep = figure.subplots(2, 2).flat
    for axis, (model, seconds) in zip(models, found["models"].items(), strict=True):
        for name, value in seconds.items():
            drawn = axis.barh(name, value, linewidth=1, **style.bar(name))
            axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=7)
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.15)
        axis.set(title=model, xlabel="seconds a step")
    for name, seconds in found["sweep"].items():
        # "auto" is the same as one of the other two at either end: it shows below them
        broad = {"linewidth": 5, "alpha": 0.4} if name.endswith("auto") else {}
        sweep.loglog([int(tokens) for tokens in seconds], list(seconds.values()), label=name,
                     **style.look(name) | broad)  # fmt: skip
    sweep.set(title="MiniLM-L6, sweep of tokens", xlabel="tokens a step", ylabel="seconds a step")
    sweep.legend()
    return figure


def compare(found: Numbers) -> Figure:
    """Accuracy of each method, mean and standard deviation, and what it trains.

    Args:
      found: task -> method -> "trained", "mean" and "spread".
    """
    rows = [len(methods) for methods in found.values()]
    figure = Figure(figsize=(7, sum(0.24 * count + 0.75 for count in rows)))
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=[n + 2 for n in rows])
    for axis, (task, methods) in zip(axes.flat, found.items(), strict=True):
        for place, (method, row) in enumerate(methods.items()):
            look = style.look(method) | {"linestyle": "", "elinewidth": 1.5}
            axis.errorbar(row["mean"], place, xerr=row["spread"], **look)
        names = [f"{method} ({row['trained']:,} trained)" for method, row in methods.items()]
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(title=task, xlabel="test accuracy")
    return figure


def fit(found: Numbers) -> Figure:
    """What is missed over trained numbers, and the spectra of fits of one size; a matrix a row.

    Args:
      found: matrix -> "entries", its "spectrum", and "methods": method -> "numbers", what they
        "missed", and the "spectrum" of one of them.
    """
    figure = Figure(figsize=(7, 9))
    axes = figure.subplots(len(found), 2, sharex="col", sharey="col")
    for (left, right), (matrix, told) in zip(axes, found.items(), strict=True):
        for method, fitted in told["methods"].items():
            look = style.look(method)
            numbers = np.array(fitted["numbers"]) / told["entries"]
            left.plot(numbers, fitted["missed"], **look)
            draw_spectrum(right, fitted["spectrum"], look, method)
        draw_spectrum(right, told["spectrum"], style.look("the matrix"), "the matrix")
        left.set(title=matrix, xscale="log", ylabel="energy missed")
        right.set(yscale="log", ylim=(1e-3, 1), ylabel="singular value")
    axes[-1, 0].set(xlabel="trained numbers by entries")
    axes[-1, 1].set(xlabel="index")
    style.legend_above(figure, axes[0, 1], columns=4)
    return figure


def draw_spectrum(axis: Any, values: list[float], look: dict[str, str], label: str) -> None:
    """Singular values, from the first."""
    axis.plot(np.arange(1, len(values) + 1), values, **look | {"marker": ""}, label=label)


def low_precision(losses: dict[str, list[float]]) -> Figure:
    """Loss curves, and how far each is from float32's.

    Args:
      losses: run -> the loss of each step.
    """
    figure = Figure(figsize=(7, 3.6))
    left, right = figure.subplots(1, 2)
    exact = np.array(losses["float32"])
    for name, found in losses.items():
        look = style.look(name) | {"marker": ""}
        left.plot(found, label=name, **look)
        if name != "float32":
            right.semilogy(np.abs(np.array(found) - exact), **look)
    left.set(xlabel="step", title="Loss")
    right.set(xlabel="step", title="Distance from the float32 run")
    style.legend_above(figure, left, columns=3)
    return figure
