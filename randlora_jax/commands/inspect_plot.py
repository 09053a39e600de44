"""How large an adapter's changes are, layer by layer, and what a LoRA of equal size could hold."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.report import Misuse, plain, progress
from randlora_jax.interop.errors import nearest, shown
from randlora_jax.interop.numpy_delta import Deltas
from randlora_jax.interop.placing import replacing_file

SPECTRA = 4  # drawn where no layers are chosen


def check_place(path: Path, *, force: bool) -> None:
    """Stop before any work is done for a picture that cannot be written to `path`.

    Raises:
      Misuse: it has no folder, or there is a file that may not be replaced.
    """
    if not path.parent.is_dir():
        raise Misuse(f"{path}: there is no directory {path.parent}")
    if os.path.lexists(path) and not force:
        raise Misuse(f"{path} exists; allow with --force that it is replaced")


def draw(deltas: Deltas, path: Path, chosen: Sequence[str], *, force: bool) -> dict[str, Any]:
    """Draw norm per layer and the singular values of some layers; returns the numbers drawn.

    A LoRA of rank R has R (in + out) numbers; its delta_W has rank R, and the best one keeps the
    first R singular values of a given delta_W and loses the others (Eckart and Young, 1936). So
    the spectrum beside the rank of a LoRA of equal size shows what that LoRA would lose.

    Raises:
      AdapterFileError: a delta_W is beyond float32.
      Misuse: matplotlib is missing or does not know the file's type, a chosen layer is not the
        adapter's, or a file has appeared at `path` and `force` is not set.
    """
    picked = [name for wanted in chosen for name in _matching(wanted, deltas)]
    figure_type = _figure_type(path)
    norms: dict[str, float] = {}
    with progress("forming delta_W", sum(_nbytes(deltas, name) for name in deltas.layers)) as done:
        for name in deltas.layers:
            delta = deltas.of(name)
            norms[name] = float(np.sqrt(np.einsum("ij,ij->", delta, delta, dtype=np.float64)))
            done(_nbytes(deltas, name))
    picked = picked or _largest_of_each_kind(norms)
    spectra: dict[str, dict[str, Any]] = {}
    with progress("singular values", sum(_nbytes(deltas, name) for name in picked)) as done:
        for name in picked:
            spectra[name] = _spectrum(deltas, name)
            done(_nbytes(deltas, name))
    figure = figure_type(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    _draw_norms(top, norms)
    _draw_spectra(bottom, spectra)
    try:
        with replacing_file(path, overwrite=force) as new:
            figure.savefig(new, format=path.suffix.lstrip("."))
    except FileExistsError:  # it appeared meanwhile
        check_place(path, force=force)
        raise
    return {"file": str(path), "norms": norms, "spectra": spectra}


def _spectrum(deltas: Deltas, name: str) -> dict[str, Any]:
    """A layer's singular values, the rank of a LoRA of equal size, and what that keeps."""
    values = np.linalg.svd(deltas.of(name), compute_uv=False)
    rank = _equal_rank(deltas, name)
    energy = np.square(values, dtype=np.float64)
    kept = float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0
    return {"values": values.tolist(), "lora_rank": rank, "lora_keeps": kept}


def _draw_norms(axes: Any, norms: dict[str, float]) -> None:
    axes.bar(range(len(norms)), list(norms.values()))
    axes.set(title="size of the change", ylabel="Frobenius norm of ΔW", xlabel="layer")
    if len(norms) <= 40:
        axes.set_xticks(range(len(norms)), [plain(name) for name in norms], rotation=90, fontsize=6)


def _draw_spectra(axes: Any, spectra: dict[str, dict[str, Any]]) -> None:
    for name, found in spectra.items():
        values, rank = np.array(found["values"]), found["lora_rank"]
        label = f"{plain(name)}: LoRA of rank {rank} keeps {found['lora_keeps']:.0%} of ‖ΔW‖²"
        (line,) = axes.plot(np.arange(1, len(values) + 1), values, label=label)
        axes.axvline(rank, color=line.get_color(), linestyle=":")
    axes.set(
        title="singular values of ΔW; dotted: the rank of a LoRA with as many numbers",
        xlabel="index",
        ylabel="singular value",
        yscale="log",
    )
    axes.legend(fontsize=7)


def _figure_type(path: Path) -> Any:
    if find_spec("matplotlib") is None:
        raise Misuse("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure  # not pyplot: that would look for a screen

    file_types = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in file_types:
        raise Misuse(f"{path}: expected a name ending in one of {', '.join(sorted(file_types))}")
    return Figure


def _matching(wanted: str, deltas: Deltas) -> list[str]:
    found = [name for name in deltas.layers if f".{name}".endswith(f".{wanted}")]
    if not found:
        raise Misuse(
            f"--layer {shown(wanted)}: no adapted layer's name ends so; there are "
            f"{nearest(wanted, deltas.layers)}"
        )
    return found


def _largest_of_each_kind(norms: dict[str, float]) -> list[str]:
    kinds: dict[str, str] = {}
    for name in sorted(norms, key=lambda name: -norms[name]):
        kinds.setdefault(name.rpartition(".")[2], name)
    return list(kinds.values())[:SPECTRA]


def _equal_rank(deltas: Deltas, name: str) -> int:
    """The rank of the LoRA that has about as many trained numbers for this layer; at least 1."""
    trained = sum(array.size for array in deltas.adapter.layers[name])
    return max(1, round(trained / sum(deltas.layers[name].shape)))


def _nbytes(deltas: Deltas, name: str) -> int:
    rows, columns = deltas.layers[name].shape
    return 4 * rows * columns
