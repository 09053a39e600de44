"""Where a step's time goes: matrix products, and all the rest, by each framework's own profiler.

    make profile      what bounds the ratios of `make bench`; four minutes

MiniLM-L6, 32 x 128 tokens: PEFT RandLoRA, PyTorch and JAX training everything, ours.

The rest (attention's softmax, gelu, norms, copies) is the model's own and nearly the same for every
way to fine-tune it, so no choice of products can bring the ratio of two steps below that of their
operations unless one framework multiplies faster.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KINETO_LOG_LEVEL"] = "99"  # PyTorch's profiler would say when it starts and stops

import jax
import torch
import transformers
from contestants import Contestant, jax_full, ours, peft_randlora, torch_full
from rich.console import Console
from rich.table import Table
from shapes import minilm

STEPS = 5
Split = tuple[float, float]  # seconds of a step in products, and in all the rest


def in_torch(step: Callable[[], float]) -> Split:
    """By PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    products, rest = 0.0, 0.0
    for event in seen.key_averages():
        product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        products += event.self_cpu_time_total * product
        rest += event.self_cpu_time_total * (not product)
    return products / 1e6, rest / 1e6


def in_jax(step: Callable[[], float]) -> Split:
    """By XLA's own trace: every operation it ran, in the order of its one main thread."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        taken = Counter[bool]()
        for plane in planes:
            for line in plane.lines:
                for event in line.events:
                    if "hlo_op" in dict(event.stats):
                        taken[is_product(event.name)] += event.duration_ns
    return taken[True] / 1e9, taken[False] / 1e9


def is_product(name: str) -> bool:
    """Whether an operation of a compiled program is a matrix product, by its name."""
    return name.startswith(("ynn_fusion", "dot"))


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    shape = minilm()
    tokens = shape.tokens(32, 128)
    table = Table("step", title="MiniLM-L6, 32 x 128 tokens; seconds under the profiler")
    for column in ("GFLOP", "step", "products", "rest", "GFLOP/s in products"):
        table.add_column(column, justify="right")
    for build, split in (
        (peft_randlora, in_torch),
        (torch_full, in_torch),
        (jax_full, in_jax),
        (ours("auto"), in_jax),
    ):
        one: Contestant = build(shape, tokens)
        splits, seconds = [], []
        for _ in range(STEPS):
            began = time.perf_counter()
            one.step()
            seconds.append(time.perf_counter() - began)
            splits.append(split(one.step))
        products, rest = (statistics.median(part) for part in zip(*splits, strict=True))
        flops = one.flops / 1e9
        numbers = [f"{n:.2f}" for n in (statistics.median(seconds), products, rest)]
        table.add_row(one.name, f"{flops:.0f}", *numbers, f"{flops / products:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
