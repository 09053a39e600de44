"""What a run of ../bench_gpu.py came to, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .cases import CONTESTANTS, DEFAULT, FULL, MERGED, PEAKS, Sizes

Report = dict[str, Any]
AIMS = {
    "seconds, of the fastest PEFT RandLoRA": 0.35,
    "seconds, of JAX full": 1.35,
    'seconds with apply="merged", of JAX full': 1.1,
    "peak bytes, of JAX full": 0.8,
}


class Figures:
    """Rows by what they are of."""

    def __init__(self, report: Report):
        self._rows = {
            (row["model"], row["kind"], row["size"], row["contestant"]): row
            for row in report["rows"]
        }

    def row(self, model: str, kind: str, size: int, contestant: str) -> Report:
        """With figures, with "failed", or empty."""
        return self._rows.get((model, kind, size, contestant), {})

    def get(self, model: str, tokens: int, contestant: str, key: str = "seconds") -> float | None:
        """A figure of training; None where there is none."""
        return self.row(model, "train", tokens, contestant).get(key)

    def fastest_peft(self, model: str, tokens: int) -> float | None:
        """Seconds of PEFT's RandLoRA in whichever way took it the fewest."""
        names = (name for name in CONTESTANTS if name.startswith("PEFT RandLoRA"))
        found = (self.get(model, tokens, name) for name in names)
        return min((seconds for seconds in found if seconds is not None), default=None)


def ratio(a: float | None, b: float | None) -> str:
    """Of two figures, if both are there."""
    return f"{a / b:.2f}" if a and b else ""


def training(report: Report, sizes: Sizes) -> Iterator[str]:
    """A row for each model, number of tokens and contestant that was run."""
    figures, peak = Figures(report), PEAKS.get(report["machine"]["device"])
    yield (
        "| model | tokens | contestant | trained | s | TFLOP/s | of the card's peak | peak GB "
        "| s, of the fastest PEFT RandLoRA | of JAX full |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for model in sizes.models:
        for tokens in sizes.tokens:
            fastest = figures.fastest_peft(model.name, tokens)
            for name in CONTESTANTS:
                row = figures.row(model.name, "train", tokens, name)
                head = f"| {model.name} | {tokens:,} | {name} |"
                if "failed" in row:
                    yield f"{head} | failed: {row['failed']} | | | | | |"
                if "seconds" not in row:
                    continue
                rate = model.step_flops(tokens, sizes.length) / row["seconds"] / 1e12
                share = f"{rate / peak:.2f}" if peak else "unknown"
                most = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.3g}"
                full = figures.get(model.name, tokens, FULL)
                yield (
                    f"{head} {row['trained']:,} | {row['seconds']:.4g} | {rate:.3g} | {share} "
                    f"| {most} | {ratio(row['seconds'], fastest)} "
                    f"| {ratio(row['seconds'], full)} |"
                )


def decoding(report: Report, sizes: Sizes) -> Iterator[str]:
    """Milliseconds for one token a row."""
    figures = Figures(report)
    yield f"| model | contestant |{''.join(f' batch {b}: ms |' for b in sizes.batches)}"
    yield f"|---|---|{'---|' * len(sizes.batches)}"
    for model in sizes.models:
        for name in CONTESTANTS:
            rows = [figures.row(model.name, "decode", b, name) for b in sizes.batches]
            if not any(rows):
                continue
            cells = [
                f"{1e3 * row['seconds']:.3g}" if "seconds" in row else row.get("failed", "")
                for row in rows
            ]
            yield f"| {model.name} | {name} | {' | '.join(cells)} |"


def aims(report: Report, sizes: Sizes) -> Iterator[str]:
    """Whether what was to be reached was, for each model and number of tokens."""
    figures, judged = Figures(report), report["machine"]["platform"] == "gpu"
    titles = "".join(f" {title}: at most {limit} |" for title, limit in AIMS.items())
    yield f"| aims: ours | tokens |{titles}"
    yield f"|---|---|{'---|' * len(AIMS)}"
    for model in sizes.models:
        for tokens in sizes.tokens:

            def of(name: str, key: str = "seconds") -> float | None:
                return figures.get(model.name, tokens, name, key)  # noqa: B023

            fastest = figures.fastest_peft(model.name, tokens)
            pairs = (
                (of(DEFAULT), fastest),
                (of(DEFAULT), of(FULL)),
                (of(MERGED), of(FULL)),
                (of(DEFAULT, "peak_bytes"), of(FULL, "peak_bytes")),
            )
            cells = []
            for (mine, other), limit in zip(pairs, AIMS.values(), strict=True):
                if not (mine and other):
                    cells.append("no figure")
                    continue
                word = "reached" if mine / other <= limit else "**not reached**"
                cells.append(f"{mine / other:.2f}, {word if judged else 'not judged on a CPU'}")
            yield f"| {model.name} | {tokens:,} | {' | '.join(cells)} |"


def whole(report: Report, sizes: Sizes) -> str:
    """All of it."""
    machine = report["machine"]
    title = f"## {machine['device']}"
    if machine["platform"] != "gpu":
        title += ": tiny shapes on a CPU, which prove the script and say nothing of speed"
    parts = [title, *(f"- {choice}" for choice in report["choices"]), ""]
    for table in (training, decoding, aims):
        parts += [*table(report, sizes), ""]
    parts += [f"- skipped: {name}: {why}" for name, why in report["skipped"].items()]
    parts += [f"- not reached in the time: {name}" for name in report["not_reached"]]
    return "\n".join(parts)
