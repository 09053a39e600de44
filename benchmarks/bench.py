"""What a training step costs: PEFT, JAX LoRA, full fine-tuning and this library, side by side.

    make bench        12 to 17 minutes; prints a table, writes out/bench/report.json and bench.png

Every contestant takes its steps in turn, so that whatever else the machine does falls on all alike;
what counts is the ratio of medians within one run. `make` pins the C allocator for all of them.
XLA's operations and bytes do not wobble; PyTorch's operations are those of its own counter.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drawings
import measured
import peft
import torch
import transformers
import wrapping
from contestants import ALL, JUDGED, KINDS, RANK, SWEPT, Builder, Contestant
from randlora_jax.interop.torch_rng import Generation, torch_bases
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import Shape, llama, minilm, opt

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.core.bases import BasisIdentity, Extents, draw

OUT = Path("out/bench")
RUNS, REPEATS, FEW = 3, 9, 3
SWEEP = {
    (1, 64): 15,
    (2, 128): 9,
    (8, 128): 5,
    (64, 128): 3,
}  # (batch, length): steps
WIDE = (32, 4096, 14336)  # r, and (in, out) of Llama-3-8B's widest layer
Report = dict[str, Any]


def main() -> None:
    """Measures everything and says what it came to."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    console, began = Console(width=max(132, Console().width)), time.perf_counter()
    small, large = minilm(), llama()
    report: Report = {"machine": {"cores": os.cpu_count(), "torch": torch.__version__}}
    report["MiniLM-L6"] = measure(small, (32, 128), 1, FEW)
    report["judged"] = measure(small, (32, 128), RUNS, REPEATS, JUDGED)
    report["OPT-125m"] = measure(opt(), (32, 128), 1, FEW)
    report["Llama-3.2-1B"] = measure(large, (2, 128), 1, FEW)
    report["sweep"] = {
        size[0] * size[1]: measure(small, size, 1, steps, SWEPT) for size, steps in SWEEP.items()
    }
    report["kinds"] = measure(large, (2, 128), 1, FEW, KINDS)
    report["adapters"] = adapters(small)
    report["bases"] = bases()
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # as a user meets it
        report["wrapping"] = fresh.submit(wrapping.wrapping).result()
    report["goals"] = goals(report)
    report["seconds"] = time.perf_counter() - began
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(console, report)
    measured.keep(OUT / "bench.json", "make bench", numbers(report))
    measured.draw(drawings.bench, OUT / "bench.json", OUT / "bench.png")
    console.print(f"{OUT}/report.json and {OUT}/bench.png, {report['seconds'] / 60:.0f} minutes")


def measure(
    shape: Shape,
    size: tuple[int, int],
    runs: int,
    repeats: int,
    contestants: Sequence[Builder] = ALL,
) -> Report:
    """Medians of interleaved steps, once for each run, and what the compilers tell.

    Every contestant comes having taken its first step, which warms the allocator.
    """
    tokens = shape.tokens(*size)
    ready: list[Contestant] = []
    for build in track(contestants, f"{shape.name}, {tokens.size} tokens: compiling"):
        ready.append(build(shape, tokens, ready))
    steps = list({one.step: None for one in ready})  # equal programs are one step
    rounds = track(range(runs * repeats), f"{shape.name}, {tokens.size} tokens: steps")
    times = [[timed(step) for step in steps] for _ in rounds]
    medians = {
        step: [statistics.median(run) for run in batched(taken, repeats)]
        for step, taken in zip(steps, zip(*times, strict=True), strict=True)
    }
    return {
        one.name: {
            **{k: v for k, v in asdict(one).items() if k not in ("name", "step")},
            "seconds": medians[one.step],
        }
        for one in ready
    }


def batched(items: Sequence[float], size: int) -> list[Sequence[float]]:
    """`items` in runs of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def timed(job: Callable[[], object]) -> float:
    """Seconds that a job takes."""
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def adapters(shape: Shape) -> Report:
    """Bytes on disk, and seconds to save, load and merge, of MiniLM's adapters."""
    found: Report = {}
    settings = {"r": RANK, "randlora_alpha": 64, "target_modules": shape.targets}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in (
            ("PEFT LoRA", peft.LoraConfig(r=8, target_modules=shape.targets)),
            ("PEFT RandLoRA", peft.RandLoraConfig(**settings)),
        ):
            where = Path(folder) / name
            model = peft.get_peft_model(shape.torch(), config)
            save = timed(lambda: model.save_pretrained(where))  # noqa: B023
            base = shape.torch()
            load = timed(lambda: peft.PeftModel.from_pretrained(base, where))  # noqa: B023
            found[name] = {"bytes": size_of(where), "save": save, "load": load}
            found[name]["merge"] = timed(model.merge_and_unload)
        where = Path(folder) / "ours"
        ours = get_peft_model(shape.flax, RandLoraConfig(**settings))
        save = timed(lambda: ours.save_pretrained(where))
        load = timed(lambda: RandLoraModel.from_pretrained(shape.flax, where))
        found["ours"] = {"bytes": size_of(where), "save": save, "load": load}
        found["ours"]["merge"] = timed(ours.merge_adapter)
    return found


def size_of(folder: Path) -> int:
    """Bytes of the weights in an adapter's folder."""
    return (folder / "adapter_model.safetensors").stat().st_size


def bases() -> Report:
    """Seconds to draw a dense pair for Llama-3-8B's widest layer, the best of seven."""
    r, n_in, n_out = WIDE
    extents = Extents(n_out, n_in // r, n_in)
    identity = BasisIdentity.drawn(0, "dense", r, smallest=n_in)

    def torchs() -> None:
        # what PEFT does when it wraps a model, of which it needs the dimensions alone
        model = SimpleNamespace(_find_dim=lambda _: (n_out, n_in))
        drawing = peft.tuners.randlora.RandLoraModel._init_randlora_A_randlora_B
        drawing(model, peft.RandLoraConfig(r=r), "default")

    def compatible() -> None:
        torch_bases(0, r, n_in, n_out, kind="dense", generation=Generation.BF16_24BIT)

    jobs = {
        "PEFT": torchs,
        "ours, from a JAX key": lambda: draw(identity, extents).B.block_until_ready(),
        "ours, as torch draws them": compatible,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(7):
        for name, job in jobs.items():
            times[name].append(timed(job))
    return {name: min(taken) for name, taken in times.items()}


def goals(report: Report) -> dict[str, dict[str, Any]]:
    """What was to be reached, what was found, whether it was."""
    found: dict[str, dict[str, Any]] = {}

    def goal(name: str, ratio: float, limit: float) -> None:
        found[name] = {"found": ratio, "limit": limit, "reached": ratio <= limit}

    def ratio(part: Report, other: str, key: str = "seconds", mine: str = "ours, auto") -> float:
        value = lambda name: (  # noqa: E731
            statistics.median(part[name][key]) if key == "seconds" else part[name][key]
        )
        return float(value(mine) / value(other))

    judged, mini, small = report["judged"], report["MiniLM-L6"], report["OPT-125m"]
    goal("MiniLM: seconds, of PEFT RandLoRA", ratio(judged, "PEFT RandLoRA"), 0.60)
    goal("MiniLM: seconds, of JAX full fine-tuning", ratio(judged, "JAX full"), 1.05)
    goal("MiniLM: temporary bytes, of JAX LoRA", ratio(mini, "JAX LoRA (qwix)", "temporary"), 1.0)
    goal("MiniLM: GFLOP of a step", mini["ours, auto"]["flops"] / 1e9, 301)
    goal("OPT, 4096 tokens: seconds, of PEFT RandLoRA", ratio(small, "PEFT RandLoRA"), 0.75)
    everywhere = {f"MiniLM, {tokens} tokens": part for tokens, part in report["sweep"].items()}
    for title, part in (everywhere | {"OPT": small, "Llama": report["Llama-3.2-1B"]}).items():
        goal(f"{title}: seconds, of PEFT RandLoRA", ratio(part, "PEFT RandLoRA"), 1)
        better = min(("ours, factored", "ours, merged"), key=lambda n: part[n]["seconds"][0])
        same = part[better]["program"] == part["ours, auto"]["program"]
        word = "the better way" + (" (the same program)" if same else "")
        goal(f"{title}: seconds, of {word}", ratio(part, better), 1.05)
    drawn = report["bases"]
    for name in ("ours, from a JAX key", "ours, as torch draws them"):
        goal(f"bases: seconds, {name[6:]}, of PEFT", drawn[name] / drawn["PEFT"], 1.0)
    for name, row in report["wrapping"].items():
        goal(f"{name}: seconds to wrap 882 kernels", row["wrap"], 2)
        goal(f"{name}: seconds to add an adapter to them", row["add"], 2)
        traces = row["trace wrapped"] / row["trace plain"]
        goal(f"{name}: tracing a first call, of the plain model's", traces, 2.5)
    return found


def show(console: Console, report: Report) -> None:
    """The table."""
    table = Table(
        title="A training step; ratios to PEFT RandLoRA in the same run (bases: to dense ones)"
    )
    for title in ("model", "way", "trained", "s", "ratio", "GFLOP", "ratio"):
        table.add_column(title, justify="left" if title in ("model", "way") else "right")
    for title in ("temporary MiB", "peak MiB", "compile s"):
        table.add_column(title, justify="right")
    parts = {k: report[k] for k in ("MiniLM-L6", "OPT-125m", "Llama-3.2-1B")}
    parts[f"MiniLM-L6, {RUNS} x {REPEATS} steps"] = report["judged"]
    parts |= {f"MiniLM, {tokens} tokens": part for tokens, part in report["sweep"].items()}
    mebi = lambda n: "" if n is None else f"{n / 2**20:.0f}"  # noqa: E731
    parts["Llama-3.2-1B: bases"] = report["kinds"]
    for model, part in parts.items():
        other = part.get("PEFT RandLoRA", part[next(iter(part))])
        for name, row in part.items():
            seconds = statistics.median(row["seconds"])
            table.add_row(
                model,
                name,
                f"{row['trained']:,}",
                f"{seconds:.3f}",
                f"{seconds / statistics.median(other['seconds']):.2f}",
                f"{row['flops'] / 1e9:.0f}",
                f"{row['flops'] / other['flops']:.2f}",
                mebi(row["temporary"]),
                mebi(row["peak"]),
                "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
                end_section=name == list(part)[-1],
            )
    console.print(table)
    files = Table(title="MiniLM's adapter on disk; bases of (32, 4096, 14336)")
    for title in ("", "bytes", "save s", "load s", "merge s", "draw s"):
        files.add_column(title, justify="right" if title else "left")
    for name, row in report["adapters"].items():
        numbers = [f"{row[k]:.3f}" for k in ("save", "load", "merge")]
        files.add_row(name, f"{row['bytes']:,}", *numbers, "")
    for name, seconds in report["bases"].items():
        files.add_row(name, "", "", "", "", f"{seconds:.2f}")
    console.print(files)
    console.print(wrapping.table(report["wrapping"]))
    aims = Table(title="Goals")
    for title in ("", "found", "at most", ""):
        aims.add_column(title)
    for name, aim in report["goals"].items():
        word = "reached" if aim["reached"] else "[bold red]not reached[/]"
        aims.add_row(name, f"{aim['found']:.3f}", f"{aim['limit']:g}", word)
    console.print(aims)


def numbers(report: Report) -> Report:
    """What is drawn of it."""
    models = {
        model: {name: round(statistics.median(row["seconds"]), 4) for name, row in part.items()}
        for model, part in report.items()
        if model in ("MiniLM-L6", "OPT-125m", "Llama-3.2-1B")
    }
    sweep: Report = {}
    for tokens, part in report["sweep"].items():
        for name, row in part.items():
            sweep.setdefault(name, {})[tokens] = round(row["seconds"][0], 4)
    return {"models": models, "sweep": sweep}


if __name__ == "__main__":
    sys.exit(main())
