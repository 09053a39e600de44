"""`make bench-gpu` on a machine without a GPU: it runs, and names whatever it could not do."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_gpu
from on_gpu import one, tables
from on_gpu.cases import CONTESTANTS, DEFAULT, FULL, ON_GPU, SMALL, Contestant
from on_gpu.following import follow
from on_gpu.one import rows

(TINY,) = SMALL.models
FIRST = SMALL.tokens[0]


def command(tmp_path, *arguments: str, lacking: str = "") -> subprocess.CompletedProcess:
    """The benchmark, in a folder of its own, on a CPU, as if packages were `lacking`."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({lacking.split()!r}))\n"
    (tmp_path / "sitecustomize.py").write_text(hide)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, "-W", "ignore", bench_gpu.__file__, *arguments]
    return subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.long
@pytest.mark.torch
def test_every_contestant_has_its_figures_and_one_that_lacks_a_package_is_named(tmp_path):
    """Minutes: a process for each contestant, and PyTorch's compiler for two of them."""
    done = command(tmp_path, "--small", "--seconds", "3000", lacking="qwix")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/bench-gpu/results.json").read_text())
    assert report["skipped"] == {"JAX LoRA (qwix)": "not installed: qwix"}
    assert "- skipped: JAX LoRA (qwix): not installed: qwix" in done.stdout
    assert report["not_reached"] == []
    found = {(row["contestant"], row["kind"], row["size"]): row for row in report["rows"]}
    sizes = [("train", n) for n in SMALL.tokens] + [("decode", n) for n in SMALL.batches]
    run = [name for name in CONTESTANTS if name not in report["skipped"]]
    assert found.keys() == {(name, *size) for name in run for size in sizes}
    for (name, kind, size), row in found.items():
        assert row.get("seconds", 0) > 0, (name, row)
        if kind == "train":
            first, last = row["losses"]
            assert last < first, f"{name} did not learn at {size} tokens: {first} to {last}"
            assert f"| {TINY.name} | {size} | {name} | {row['trained']:,} | " in done.stdout
    trained = {name: found[name, "train", FIRST]["trained"] for name in run}
    assert trained[DEFAULT] == trained["ours, factored"] == trained["PEFT RandLoRA"]
    assert "not judged on a CPU" in done.stdout and ", reached" not in done.stdout


@pytest.mark.parametrize("name", [DEFAULT, pytest.param("PEFT RandLoRA", marks=pytest.mark.torch)])
def test_a_contestant_decodes_and_learns(name):
    """As its process runs it, but in this one."""
    sizes = replace(SMALL, tokens=SMALL.tokens[:1])
    decoded, trained = rows(CONTESTANTS[name], TINY, sizes, "xla")
    assert decoded["kind"] == "decode" and decoded["seconds"] > 0
    assert trained["kind"] == "train" and trained["seconds"] > 0 and trained["trained"] == 1088
    first, last = trained["losses"]
    assert last < first


class Bursting:
    """A side that has room for 64 tokens."""

    trained = 7

    def train(self, ids):
        if ids[:, 1:].size > 64:
            raise MemoryError("99 GB\nand a long tale")
        return lambda: 0.5

    def decode(self, ids):
        return lambda: None

    def forget_peak(self):
        pass

    def memory(self):
        return {"peak_bytes": 5}


def test_what_bursts_is_a_result_and_larger_sizes_are_not_tried(monkeypatch):
    monkeypatch.setattr(one, "side_of", lambda *_: Bursting())
    sizes = replace(SMALL, tokens=(64, 128, 256))
    _, fits, bursts, larger = rows(CONTESTANTS[DEFAULT], TINY, sizes, "xla")
    assert fits["size"] == 64 and fits["peak_bytes"] == 5 and fits["trained"] == 7
    assert bursts == {"kind": "train", "size": 128, "failed": "MemoryError: 99 GB"}
    assert larger == {"kind": "train", "size": 256, "failed": "not tried, since 128 tokens failed"}


def test_losses_that_are_no_numbers_are_a_failure(monkeypatch):
    monkeypatch.setattr(Bursting, "train", lambda *_: lambda: float("nan"))
    monkeypatch.setattr(one, "side_of", lambda *_: Bursting())
    row = list(rows(CONTESTANTS[DEFAULT], TINY, SMALL, "xla"))[-2]
    assert row["failed"].startswith("FloatingPointError: losses are not all finite")


def test_without_a_gpu_it_says_what_can_be_run(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "jax finds no GPU here" in done.stderr and "--small" in done.stderr


def test_what_this_library_lacks_is_named_at_once(tmp_path):
    done = command(tmp_path, "--small", lacking="flax optax")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "not installed: flax, optax" in done.stderr


def test_a_contestant_that_dies_keeps_its_figures_and_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"kind": "train", "size": FIRST, "seconds": 0.5, "peak_bytes": 10**9, "trained": 7}
    code = f"""
import json, os, sys
print(json.dumps({row}), flush=True)
print("allocating 99 GB", file=sys.stderr, flush=True)
os.kill(os.getpid(), 9)
"""
    run = bench_gpu.Run(SMALL, seconds=100, began=time.monotonic())
    run.one(CONTESTANTS[DEFAULT], TINY, python(code), os.environ)
    kept = json.loads((tmp_path / "out/bench-gpu/results.json").read_text())["rows"]
    assert kept[0] == {"model": TINY.name, "contestant": DEFAULT, **row}
    failed = kept[1:]
    assert [(r["kind"], r["size"]) for r in failed] == [
        *(("decode", batch) for batch in SMALL.batches),
        ("train", SMALL.tokens[1]),
    ]
    why = "ended by SIGKILL (often for want of memory): allocating 99 GB"
    assert {r["failed"] for r in failed} == {why}
    assert f"FAILED: {why}" in capsys.readouterr().out
    assert run.has_ours()


def test_no_process_is_started_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = bench_gpu.Run(SMALL, seconds=SMALL.start_seconds - 1, began=time.monotonic())
    run.one(CONTESTANTS[DEFAULT], TINY, python("raise SystemExit(1)"), os.environ)
    assert run.report["not_reached"] == [f"{TINY.name} | {DEFAULT}"] and not run.report["rows"]
    assert not run.has_ours()


def test_a_process_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    code = """
import json, subprocess, time
child = subprocess.Popen(["sleep", "60"])
print(json.dumps({"child": child.pid}), flush=True)
time.sleep(60)
"""
    rows, began = [], time.monotonic()
    why = follow(python(code), os.environ, tmp_path / "log", 5.0, rows.append)
    assert why == "stopped after 5 s"
    while alive(rows[0]["child"]):  # a killed process is gone a moment later
        assert time.monotonic() - began < 30
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_an_error_of_a_process_is_its_last_line(tmp_path):
    why = follow(
        python("raise ValueError('no such card')"), os.environ, tmp_path / "log", 60, print
    )
    assert why == "ended with status 1: ValueError: no such card"


def test_contestants_that_cannot_run_are_named():
    strange = Contestant("strange", "jax", "LoRA", ("no_such_package", "json"))
    peft = Contestant("peft", "torch", "LoRA", ("json",))
    fine = {"device": "a card"}
    assert bench_gpu.without([strange, peft], fine, small=False) == {
        "strange": "not installed: no_such_package"
    }
    assert bench_gpu.without([peft], {"device": None}, small=False) == {
        "peft": "this PyTorch finds no CUDA device"
    }
    assert bench_gpu.without([peft], {"device": None}, small=True) == {}
    assert "OSError" in bench_gpu.without([peft], {"failed": "OSError: libcudart"}, False)["peft"]


def report_of(device: str, rows: list[dict]) -> dict:
    machine = {"device": device, "platform": "gpu"}
    same = {"model": ON_GPU.models[0].name, "kind": "train", "size": 2048, "trained": 1}
    return {
        "machine": machine,
        "rows": [{**same, **row} for row in rows],
        "choices": [],
        "skipped": {},
        "not_reached": ["later"],
    }


def test_the_tables_say_shares_aims_and_failures():
    report = report_of(
        "NVIDIA H200",
        [
            {"contestant": DEFAULT, "seconds": 0.3, "peak_bytes": 9e9},
            {"contestant": FULL, "seconds": 0.2, "peak_bytes": 10e9},
            {"contestant": "PEFT RandLoRA", "seconds": 2.0, "peak_bytes": 1e10},
            {"contestant": "PEFT RandLoRA, compiled", "seconds": 1.0, "peak_bytes": 1e10},
            {"contestant": "PEFT LoRA", "failed": "OutOfMemoryError: 4 GiB"},
        ],
    )
    text = tables.whole(report, ON_GPU)
    model = ON_GPU.models[0]
    rate = 6 * 2048 * (model.kernels + 16 * 2048 * 2048) / 0.3 / 1e12
    share = f"{rate:.3g} | {rate / 989:.2f} | 9 | 0.30 | 1.50 |"
    assert f"| Llama-3.2-1B | 2,048 | {DEFAULT} | 1 | 0.3 | {share}" in text
    judged = "0.30, reached | 1.50, **not reached** | no figure | 0.90, **not reached** |"
    assert f"| Llama-3.2-1B | 2,048 | {judged}" in text
    assert "| PEFT LoRA | | failed: OutOfMemoryError: 4 GiB |" in text
    assert "- not reached in the time: later" in text
    assert "| unknown |" in tables.whole(report_of("NVIDIA X", report["rows"][:1]), ON_GPU)


def test_the_shapes_are_the_real_ones():
    llama = ON_GPU.models[0]
    norms = (2 * llama.layers + 1) * llama.width
    assert llama.kernels + norms == 1_235_814_400  # Llama-3.2-1B's published number
    assert llama.step_flops(2, 10) == 12 * (llama.kernels + 16 * 10 * 2048)
