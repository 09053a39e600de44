"""What a bfloat16 step costs on a GPU: PEFT, JAX LoRA, full fine-tuning and this library.

    make bench-gpu PYTHON=python3            ten minutes at most; any Python with a CUDA jax
    make bench-gpu BENCH_GPU_ARGS=--small    tiny shapes on the CPU: does the script run?

Nothing is installed or downloaded. Each contestant has a process of its own for each model, so that
peaks of memory are its own; what matters most goes first. Whatever lacks, fails or is not reached
in the time is named. Figures are in out/bench-gpu/results.json as soon as they are taken, beside
what each process wrote; the tables come at the end. Exit status 1: no figure of ours by default.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from on_gpu import tables
from on_gpu.cases import (
    CONTESTANTS,
    DEFAULT,
    FLOPS,
    LORA_RANK,
    OURS,
    PEAKS,
    RANK,
    RATE,
    ROUNDS,
    SIZES,
    Contestant,
    Model,
    Sizes,
)
from on_gpu.following import follow
from on_gpu.timing import TIMING

ROOT = Path(__file__).parents[1]
OUT = Path("out/bench-gpu")
SECONDS = 570.0  # ten minutes less what the last process and the tables may take
PROBE_SECONDS = 120.0
Report = dict[str, Any]


def environment(small: bool) -> dict[str, str]:
    """Of every process: this clone is imported, whether installed or not; no network."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.90",
    }
    if small:
        settings |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}
    return {**os.environ, **settings}


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of on_gpu/ by this Python."""
    return [sys.executable, "-W", "ignore", "-m", f"on_gpu.{name}", *arguments]


def probed(framework: str, env: dict[str, str]) -> tuple[Report, str | None]:
    """What a framework finds here, and why it could not say."""
    found: list[Report] = []
    log = OUT / "processes" / f"machine-{framework}.log"
    why = follow(module("machine", framework), env, log, PROBE_SECONDS, found.append)
    return (found[0], None) if found else ({}, why)


def missing(names: Sequence[str]) -> list[str]:
    """What of these is not installed."""
    return [name for name in names if not find_spec(name)]


def without(contestants: Iterable[Contestant], torch: Report, small: bool) -> dict[str, str]:
    """Contestants that cannot run here, and why."""
    skipped = {}
    for one in contestants:
        if lacks := missing(one.needs):
            skipped[one.name] = f"not installed: {', '.join(lacks)}"
        elif one.side == "torch" and "failed" in torch:
            skipped[one.name] = f"PyTorch cannot be imported: {torch['failed']}"
        elif one.side == "torch" and not small and torch["device"] is None:
            skipped[one.name] = "this PyTorch finds no CUDA device"
    return skipped


def choices(machine: Report, torch: Report, sizes: Sizes) -> Iterator[str]:
    """Everything that was chosen."""
    releases = {"python": sys.version.split()[0], **machine["versions"]}
    releases |= torch.get("versions", {})
    yield ", ".join(f"{name} {release}" for name, release in releases.items() if release)
    for model in sizes.models:
        yield f"{model}; embeddings tied; random weights in bfloat16"
    yield f"sequences of {sizes.length:,} tokens; layers are not rematerialised; AdamW, rate {RATE}"
    yield "head and loss one sequence at a time, anew in the backward pass, in both frameworks"
    yield (
        f"RandLoRA r {RANK}, dense bases, LoRA r {LORA_RANK}, on the seven linear layers of every "
        "block; adapters in the type that each library gives them; full training is all bfloat16, "
        "Adam's moments too"
    )
    why = f" ({machine['why']})" if "why" in machine else ""
    yield f"attention: {machine['attention']}{why} in JAX, sdpa in PyTorch"
    yield (
        "PyTorch: torch.autocast to bfloat16, as Trainer(bf16=True) has it, unless it says "
        '"no autocast"; what stays float32 may take TF32; compiled: torch.compile(dynamic=False)'
    )
    yield TIMING
    yield (
        "peak GB (1e9 bytes): the most that JAX's or PyTorch's allocator had handed out"
        if machine["platform"] == "gpu"
        else "peak GB (1e9 bytes): what XLA plans for a step; PyTorch does not tell on a CPU"
    )
    yield f"operations: {FLOPS}"
    peak = PEAKS.get(machine["device"])
    yield f"the card's bfloat16 peak: {f'{peak:g} TFLOP/s, dense' if peak else 'unknown'}"
    yield "decoding: the model on (batch, 1) tokens, no cache, adapters not merged into the weights"


class Run:
    """A run as far as it is: whatever is noted is in the file at once."""

    def __init__(self, sizes: Sizes, seconds: float, began: float):
        self._sizes, self._seconds, self._began = sizes, seconds, began
        self.report: Report = {"rows": [], "skipped": {}, "not_reached": []}

    def left(self) -> float:
        """Seconds."""
        return self._seconds - (time.monotonic() - self._began)

    def save(self) -> None:
        """The report, as one: a run that is cut keeps what it has."""
        OUT.mkdir(parents=True, exist_ok=True)
        self.report["seconds"] = time.monotonic() - self._began
        new = OUT / "results.json.new"
        new.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(new, OUT / "results.json")

    def note(self, contestant: Contestant, model: Model, row: Report) -> None:
        """A row of a process."""
        self.report["rows"].append({"model": model.name, "contestant": contestant.name, **row})
        self.save()
        what = f"{row['size']:,} tokens" if row["kind"] == "train" else f"decoding {row['size']}"
        peak = f", {row['peak_bytes'] / 1e9:.3g} GB" if row.get("peak_bytes") else ""
        found = f"{row['seconds']:.4g} s{peak}" if "seconds" in row else f"FAILED: {row['failed']}"
        at = time.monotonic() - self._began
        print(f"[{at:3.0f} s] {model.name} | {contestant.name} | {what}: {found}", flush=True)

    def one(self, contestant: Contestant, model: Model, command: list[str], env: Any) -> None:
        """A contestant on a model, if there is time; what it did not come to has failed."""
        if self.left() < self._sizes.start_seconds:
            self.report["not_reached"].append(f"{model.name} | {contestant.name}")
            return self.save()
        wanted = [("decode", batch) for batch in self._sizes.batches]
        wanted += [("train", tokens) for tokens in self._sizes.tokens]

        def on_row(row: Report) -> None:
            wanted.remove((row["kind"], row["size"]))
            self.note(contestant, model, row)

        name = f"{model.name}-{contestant.name}".replace(" ", "_").replace(",", "")
        limit = min(self._sizes.process_seconds, self.left())
        why = follow(command, env, OUT / "processes" / f"{name}.log", limit, on_row)
        for kind, size in wanted:
            row = {"kind": kind, "size": size, "failed": why or "its process gave no figure"}
            self.note(contestant, model, row)

    def has_ours(self) -> bool:
        """Whether there is any figure of our default."""
        return any(row["contestant"] == DEFAULT and "seconds" in row for row in self.report["rows"])


def main() -> int:
    """Runs what can be run and says what it came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in which it must be done")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that children end with us
    began, env = time.monotonic(), environment(args.small)
    chosen = "small" if args.small else "gpu"
    sizes = SIZES[chosen]
    machine, why = probed("jax", env)
    if not machine:
        lacks = ", ".join(missing(OURS)) or "nothing that it asks for"
        sys.exit(
            f"this library cannot run here: {why} (not installed: {lacks}; this command \
installs nothing)"
        )
    if machine["platform"] != "gpu" and not args.small:
        sys.exit(
            f"jax finds no GPU here, only {machine['device']} ({machine['platform']}): with \
BENCH_GPU_ARGS=--small tiny shapes run on the CPU"
        )
    torch: Report = {"failed": "not asked"}
    if find_spec("torch"):
        torch, why = probed("torch", env)
        torch = torch or {"failed": why}
    run = Run(sizes, args.seconds, began)
    run.report |= {
        "machine": machine,
        "torch": torch,
        "choices": list(choices(machine, torch, sizes)),
        "skipped": without(CONTESTANTS.values(), torch, args.small),
    }
    run.save()
    print(f"{machine['device']}:", *run.report["choices"], sep="\n- ", flush=True)
    for name, reason in run.report["skipped"].items():
        print(f"skipped: {name}: {reason}", flush=True)
    for contestants in ROUNDS:
        for model in sizes.models:
            for contestant in contestants:
                if contestant.name not in run.report["skipped"]:
                    arguments = (chosen, model.name, contestant.name, machine["attention"])
                    run.one(contestant, model, module("one", *arguments), env)
    print("", tables.whole(run.report, sizes), sep="\n")
    print(f"\n{OUT}/results.json, {run.report['seconds']:.0f} s")
    return 0 if run.has_ours() else 1


if __name__ == "__main__":
    sys.exit(main())
