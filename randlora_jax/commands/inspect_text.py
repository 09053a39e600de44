"""What `inspect` found, as text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from randlora_jax.commands.report import plain, size
from randlora_jax.interop.draws import RELEASES


def in_words(data: dict[str, Any]) -> str:
    """The report for people."""
    parts = [_what(data), _layers(data), _bytes(data["bytes"]), _bases(data), _numbers(data)]
    return "\n\n".join("\n".join(part) for part in parts)


def _what(data: dict[str, Any]) -> Iterator[str]:
    config = data["config"]
    peft = config.get("peft_version")
    writer = "randlora-jax" if data["bases"]["recorded"] else f"PEFT {peft}" if peft else "PEFT"
    yield f"RandLoRA adapter in {data['directory']}, written by {plain(writer)}"
    base = config["base_model_name_or_path"] or "not named"
    task = f" ({config['task_type']})" if config["task_type"] else ""
    yield f"base model: {plain(base)}{task}"
    alpha, r = config["randlora_alpha"], config["r"]
    yield f"rank {r}, alpha {alpha:g}: updates are scaled by {alpha / r:g}"
    if data["subfolders"]:
        yield f"more adapters in subfolders: {', '.join(map(plain, data['subfolders']))}"


def _layers(data: dict[str, Any]) -> Iterator[str]:
    rows = [("layers", "", "out x in", "bases", "trained numbers")]
    for row in data["layers"]:
        out_in = "{} x {}".format(*row["shape"]) if row["shape"] else f"{row['smaller_side']} x ?"
        count, trained = f"{row['count']} x", f"{row['trained']:,}"
        rows.append((count, plain(row["name"]), out_in, str(row["bases"]), trained))
    yield from _columns(rows)
    if any(row["shape"] is None for row in data["layers"]):
        yield "the file tells the smaller side only; give the base model with --base for the other"
    if whole := [key for key in data["saved"] if key not in data["carried"]]:
        yield f"trained besides: {_some(whole)}"
    if data["carried"]:
        yield f"carried besides, and not trained: {_some(data['carried'])}"


def _bytes(sizes: dict[str, int]) -> Iterator[str]:
    what = {
        "trained": "trained numbers",
        "carried": "the base model's own weights, which PEFT adds",
        "bases": "the bases once, in the smallest dtype that holds them",
        "header": "header",
        "waste": f"waste, which `compact` drops: the bases {sizes['copies_of_bases']} times in all",
    }
    yield f"{size(sizes['file'])} in the file, of which"
    yield from _columns([(size(sizes[key]), what[key]) for key in what if sizes[key]])


def _bases(data: dict[str, Any]) -> Iterator[str]:
    bases = data["bases"]
    key, recorded = bases["key"], bases["recorded"]
    if bases["in_file"]:
        shapes = f"A {tuple(bases['A'])} and B {tuple(bases['B'])} in {bases['dtype']}"
        yield f"{bases['kind']} bases: {shapes}"
    else:
        yield f"{bases['kind']} bases: not in the file; a reader draws them from key {key}"
    if recorded:
        yield f"recorded as drawn by {plain(recorded['source'])} from key {recorded['key']}"
    if bases["torch"] is None:
        yield (
            "which torch generation drew them cannot be told: the file has no digest of them"
            if recorded is None
            else "to compare their digest with each torch generation, give --base"
        )
        return
    if bases["in_file"]:
        yield _draw_in_short(bases)
        return
    yield f"what PyTorch draws from key {key}:"
    rows = []
    for row in bases["torch"]:
        dtypes = " or ".join(row["base_dtypes"])
        same = f"the same, for a base model in {dtypes}"
        verdict = same if dtypes else "other bases than this adapter's"
        releases = RELEASES.get(row["generation"], "every torch release")
        rows.append((row["generation"] or bases["kind"], releases, verdict))
    yield from _columns(rows)


def _draw_in_short(bases: dict[str, Any]) -> str:
    """Whether PyTorch draws bases that the file holds, which matters to who would drop them."""
    same = [row["generation"] or bases["kind"] for row in bases["torch"] if row["base_dtypes"]]
    if not same:
        return f"no known torch release draws these from key {bases['key']}"
    return f"PyTorch draws the same from key {bases['key']} ({', '.join(same)})"


def _numbers(data: dict[str, Any]) -> Iterator[str]:
    numbers = data["numbers"]
    for key, bad in numbers["not_finite"].items():
        yield f"NOT FINITE: {plain(key)}: {bad} numbers are NaN or infinite"
    if numbers["not_finite"]:
        yield "training diverged or the file was damaged: use an earlier save"
    else:
        yield "all numbers are finite"
    yield (
        f"largest lambda {numbers['largest_lambda']:.3g}, "
        f"largest gamma {numbers['largest_gamma']:.3g}"
    )
    if idle := numbers["without_effect"]:
        yield f"lambda is zero, so nothing changes, in {len(idle)} layers: {_some(idle)}"
    if plot := data["plot"]:
        yield f"norms and singular values are drawn in {plot['file']}"


def _some(names: Collection[str]) -> str:
    """The first of some names, and how many there are."""
    listed = ", ".join(map(plain, list(names)[:6]))
    return f"{listed} and {len(names) - 6} more" if len(names) > 6 else listed


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines, columns of numbers to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if cell and not cell[0].isdigit() else cell.rjust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        yield ("  " + "  ".join(cells)).rstrip()
