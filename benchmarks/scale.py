"""A plan for Llama 8B on 8 chips and 70B on 64, from compiled programs of the real shapes.

    make scale                     five minutes on two cores; writes out/scale/results.json, too
    make scale SCALE_ARGS=whole    all blocks of 8B in one program; a quarter of an hour

No TPU is needed, and no array is made: steps are compiled for chips that are not here. Of each, one
of one layer and one of two are compiled; what the second has more is a layer's share, and what is
printed is the first and as many shares as the model has further layers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from partitioned import KINDS, Program, held
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

OUT = Path("out/scale")
STEP = Path(__file__).with_name("scale_step.py")
METHODS = ("RandLoRA", "RandLoRA, merged", "LoRA", "full")
# layers; and the extents of the mesh axes fsdp and tp
MODELS = {
    "8B": (32, ((8, 1), (4, 2), (2, 4))),
    "70B": (80, ((64, 1), (16, 4))),  # its chips lie 4 x 4 x 4, each axis of the mesh along some
}
SECONDS = 1200.0  # after which a compile is given up
LAST = "*after_optimizations_after_buffer_assignment.txt"  # written when all we read is there
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
LIVE = "live bytes"  # alone does not add up over layers: most may live elsewhere with more of them
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One row: a model on a mesh of fsdp x tp chips, and how it is trained."""

    model: str
    fsdp: int
    tp: int
    method: str


def cases() -> list[Case]:
    """All rows, in the tables' order."""
    return [
        Case(model, *mesh, method)
        for model, (_, meshes) in MODELS.items()
        for mesh in meshes
        for method in METHODS
    ]


def figures(folder: Path) -> Figures:
    """Of one step, out of what XLA wrote into a folder."""

    def text(name: str) -> str:
        (found,) = folder.glob(f"*{name}.txt")
        return found.read_text()

    program = Program(text(".after_optimizations"))
    memory = held(
        text("after_optimizations-buffer-assignment"), text("after_optimizations-live-range")
    )
    return {
        **json.loads((folder / "told.json").read_text()),
        "given bytes": memory.given,
        LIVE: memory.live,
        **{f"{types} FLOP": count for types, count in program.products.items()},
        **{f"{kind} count": sent.count for kind, sent in program.sent.items()},
        **{f"{kind} bytes": sent.nbytes for kind, sent in program.sent.items()},
    }


def compiled(case: Case, layers: int) -> Figures:
    """Of a step of so many layers.

    XLA writes its last program, then makes machine code of it, which takes ten times as long as all
    before and tells nothing more: there the compiler is stopped.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        mesh = (str(case.fsdp), str(case.tp))
        command = [sys.executable, "-W", "ignore", str(STEP), case.model, case.method, *mesh]
        with log.open("w") as told:
            child = subprocess.Popen(
                [*command, str(layers), name],
                stdout=told,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
            )
        began, ended = time.monotonic(), False
        try:
            while not list(folder.glob(LAST)):
                if ended or time.monotonic() - began > SECONDS:
                    raise SystemExit(f"{case}: nothing was compiled\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
                ended = child.poll() is not None
        finally:
            child.kill()
            child.wait()
        return figures(folder)


def of_layers(one: Figures, two: Figures, layers: int) -> Figures:
    """Figures of a model, from those of one layer and of two."""
    share = shares(one, two)
    return {name: one.get(name, 0) + (layers - 1) * more for name, more in share.items()}


def shares(one: Figures, two: Figures) -> Figures:
    """Of one layer inside a stack."""
    names = (name for name in dict.fromkeys([*one, *two]) if name != LIVE)
    return {name: two.get(name, 0) - one.get(name, 0) for name in names}


def table(title: str, columns: tuple[str, ...]) -> Table:
    """An empty one, as Markdown has them."""
    found = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for name in columns:
        found.add_column(name, justify="left" if name in ("mesh", "method") else "right")
    return found


def steps(model: str, rows: Mapping[Case, Mapping[str, Figures]], live: str) -> Table:
    """What a chip does and holds in a step of a model; what lives, in the program `live`."""
    found = table(
        f"{model}, a step, of one chip",
        (
            "mesh",
            "method",
            "trained",
            "TFLOP",
            "of full",
            "given GB",
            f"live GB, {live}",
            "sent GB",
            "sends",
        ),
    )
    for case, row in rows.items():
        whole, full = row["whole"], rows[Case(case.model, case.fsdp, case.tp, "full")]["whole"]
        flops = total(whole, "FLOP")
        found.add_row(
            f"{case.fsdp} x {case.tp}",
            case.method,
            f"{whole['trained'] / 1e6:,.1f} M",
            f"{flops / 1e12:,.0f}",
            f"{flops / total(full, 'FLOP'):.2f}",
            f"{whole['given bytes'] / 1e9:.1f}",
            f"{row[live][LIVE] / 1e9:.1f}",
            f"{sum(whole.get(f'{kind} bytes', 0) for kind in KINDS) / 1e9:,.1f}",
            f"{sum(whole.get(f'{kind} count', 0) for kind in KINDS):,.0f}",
        )
    return found


def layers_table(model: str, rows: Mapping[Case, Mapping[str, Figures]]) -> Table:
    """What a chip multiplies, by the operands' type, and sends, by the kind, for one layer."""
    types = sorted({name for row in rows.values() for name in row["layer"] if "FLOP" in name})
    found = table(
        f"{model}, a layer's share, of one chip: TFLOP; collectives, and MB sent by them",
        ("mesh", "method", *(name.replace(" FLOP", "") for name in types), *KINDS),
    )
    for case, row in rows.items():
        layer = row["layer"]
        sent = ((layer.get(f"{kind} {what}", 0) for what in ("count", "bytes")) for kind in KINDS)
        found.add_row(
            f"{case.fsdp} x {case.tp}",
            case.method,
            *(f"{layer.get(name, 0) / 1e12:.2f}" for name in types),
            *(f"{count:.0f}: {nbytes / 1e6:,.1f}" if count else "" for count, nbytes in sent),
        )
    return found


def memories(model: str, rows: Mapping[Case, Mapping[str, Figures]]) -> Table:
    """What `model.memory()` says, before anything is compiled; the same for each way to apply."""
    kinds = ("base", "bases", "adapters", "gradients", "adamw")
    found = table(f"{model}, model.memory() of one chip, GB", ("mesh", *kinds, "total"))
    for case, row in rows.items():
        if case.method == METHODS[0]:
            sizes = [row["whole"][f"memory {kind}"] / 1e9 for kind in kinds]
            found.add_row(f"{case.fsdp} x {case.tp}", *(f"{x:.2f}" for x in [*sizes, sum(sizes)]))
    return found


def total(whole: Figures, unit: str) -> float:
    """Of all figures in a unit."""
    return sum(count for name, count in whole.items() if name.endswith(unit))


def tables(rows: Mapping[Case, Mapping[str, Figures]]) -> Iterator[Table]:
    """Three of each model."""
    for model in MODELS:
        mine = {case: row for case, row in rows.items() if case.model == model}
        yield steps(model, mine, live="2 layers")
        yield layers_table(model, mine)
        yield memories(model, mine)


def compiled_whole() -> Table:
    """All blocks of 8B, to be compared with the sums that the other tables give."""
    model, (layers, _) = "8B", MODELS["8B"]
    cases = [Case(model, 4, 2, method) for method in METHODS if method != "LoRA"]
    rows = {case: {"whole": compiled(case, layers)} for case in track(cases, "compiling")}
    return steps(model, rows, live="whole")


def main() -> None:
    """Compiles everything, says what it came to and writes it down, each row as soon as it is."""
    console, began = Console(width=max(132, Console().width)), time.monotonic()
    if sys.argv[1:] == ["whole"]:
        console.print(compiled_whole())
        return
    rows: dict[Case, Mapping[str, Figures]] = {}
    OUT.mkdir(parents=True, exist_ok=True)
    for case in track(cases(), "compiling"):
        one, two = (compiled(case, layers) for layers in (1, 2))
        whole = of_layers(one, two, MODELS[case.model][0])
        rows[case] = {"1 layer": one, "2 layers": two, "layer": shares(one, two), "whole": whole}
        seconds = time.monotonic() - began
        said = [{**asdict(case), **row} for case, row in rows.items()]
        report = {"seconds": seconds, "rows": said}
        (OUT / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for each in tables(rows):
        console.print(each)
    console.print(f"{OUT}/results.json, {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
