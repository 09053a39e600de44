"""How a command ends: Ctrl-C, closed pipes, full disks, poor terminals; JSON for every outcome."""

import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import transformers
from doomed import command_and_die
from peft_side import save_adapter

from randlora_jax.commands import compact as compact_module
from randlora_jax.commands import report as report_module
from randlora_jax.commands.command_line import COMMANDS
from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["randlora_jax.commands.compact", "randlora_jax.commands.merge"])
WRITES = ["compact", "convert", "merge", "to-lora"]
READS = ["inspect", "verify"]
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A base model, an adapter, and rules for its names, that nobody changes.

    The model has no Flax class, which `verify` would take its time to compile.
    """
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"hidden_size": 36, "intermediate_size": 52, "vocab_size": 97}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = transformers.Qwen2Config(**sizes, **heads, tie_word_embeddings=False)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    save_adapter("llama", folder / "base", folder / "adapter", target_modules=TARGETS)
    (folder / "rules.json").write_text('{"model/(.*)": "net/\\\\1"}')
    return folder


def command(name, sources, out, adapter=None):
    base = ["--base", sources / "base"]
    given = {
        "inspect": base,
        "verify": base,
        "compact": [out],
        "convert": [out, "--to", "torch", "--names", sources / "rules.json"],
        "to-lora": [*base, out, "--rank", "2"],
        "merge": [*base, out],
    }[name]
    return [name, *map(str, [adapter or sources / "adapter", *given])]


def ask(capsys, *words):
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def run(*words, first="", folder=None, env=None, **options):
    """The command in a process of its own, which runs `first` before anything is imported."""
    more = dict(env or {})
    if first:
        (folder / "sitecustomize.py").write_text(first)
        more["PYTHONPATH"] = os.pathsep.join(
            [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(
        [sys.executable, "-m", "randlora_jax", *words],
        env={**os.environ, **more},
        text=True,
        errors="replace",
        **(usual | options),
    )


def end_of(process):
    """Exit status, stdout, stderr."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return process.returncode, out, err


# Where the report goes.

SAYS_MUCH_OR_LITTLE = {
    "inspect": ["inspect", "{adapter}"],
    "json": ["inspect", "{adapter}", "--json"],
    "help": ["inspect", "--help"],
    "version": ["--version"],
    "misuse in JSON": ["inspect", "{adapter}/absent", "--json"],
}


@pytest.mark.parametrize("how", SAYS_MUCH_OR_LITTLE)
def test_nobody_reads_or_the_disk_is_full(sources, how):
    words = [word.format(adapter=sources / "adapter") for word in SAYS_MUCH_OR_LITTLE[how]]
    reading, writing = os.pipe()
    os.close(reading)
    closed = run(*words, stdout=writing)
    os.close(writing)
    with open("/dev/full", "w") as full:
        filled = run(*words, stdout=full)
    status, _, said = end_of(closed)
    assert status == 141  # 128 + SIGPIPE
    assert (
        said.splitlines()[-1] == "randlora-jax: whoever was to read the report has stopped reading"
    )
    status, _, said = end_of(filled)
    assert status == 2 and "the report could not be written: No space left" in said
    if "misuse" not in how:
        assert len(said.splitlines()) == 1


def test_nobody_to_tell(sources, tmp_path):
    """Without stderr the exit status is right all the same, and stdout is the report's alone."""
    with open("/dev/full", "w") as full:
        failing = run("inspect", str(tmp_path), "--json", stderr=full)
        out, _ = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "found no adapter_config.json" in json.loads(out)["error"]
    line = f"{sys.executable} -m randlora_jax inspect {tmp_path} 2>&-"
    done = subprocess.run(line, shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stdout == ""
    line = f"{sys.executable} -m randlora_jax inspect {sources / 'adapter'} >&-"
    done = subprocess.run(line, shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-8:strict"])
def test_letters_that_a_terminal_lacks(sources, tmp_path, encoding):
    env = {"PYTHONIOENCODING": encoding}
    good = run("compact", str(sources / "adapter"), str(tmp_path / "ä\u2603\udcff"), env=env)
    bad = run("inspect", str(tmp_path / "\u2603\udcff"), env=env)
    status, out, said = end_of(good)
    assert status == 0 and out and not said
    assert os.listdir(os.fsencode(tmp_path)) == ["ä\u2603\udcff".encode("utf-8", "surrogateescape")]
    status, out, said = end_of(bad)
    assert status == 2 and "no such directory" in said and not out


def test_bars_are_for_terminals(sources, tmp_path, monkeypatch, capsys):
    """Here none is one; `test_progress_shows_bytes_after_two_seconds` has one."""
    with report_module.progress("reading", 4_000_000) as advance:
        advance(1_000_000)
        time.sleep(2.1)
        advance(1_000_000)
    monkeypatch.setattr(sys, "stderr", None)
    with report_module.progress("reading", 4_000_000) as advance:
        advance(4_000_000)
    assert capsys.readouterr().err == ""


# Ctrl-C.

INTERRUPT = """
import os, signal, sys
def see(event, arguments, seen=[]):
    if event == "import" and arguments[0] == {module!r} and not seen:
        seen.append(1)
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(see)
"""


@pytest.mark.parametrize(
    "module",
    [
        "randlora_jax.commands.command_line",
        "argparse",
        "numpy",
        "numpy.random",
        "ml_dtypes",
        "safetensors",
        "tqdm",
        "randlora_jax.interop.torch_rng",
    ],
)
def test_interrupted_while_it_imports(sources, tmp_path, module):
    words = ["inspect", str(sources / "adapter"), "--json"]
    process = run(*words, first=INTERRUPT.format(module=module), folder=tmp_path)
    status, out, said = end_of(process)
    assert status == 130 and said == "randlora-jax: interrupted\n"
    assert json.loads(out) == {"good": False, "error": "interrupted", "warnings": []}


def test_nothing_is_imported_before_an_interrupt_is_answered():
    """But for what Python imports as it starts."""
    program = "import sys; before = set(sys.modules); import randlora_jax.commands.main; "
    program += "print(*sorted(set(sys.modules) - before - {'__future__'}))"
    found = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert found == ["randlora_jax", "randlora_jax.commands", "randlora_jax.commands.main"]


# One call that lets no KeyboardInterrupt through for many seconds, as a large decomposition does.
LONG_CALL = """
import hashlib, sys
from randlora_jax.commands import {module}
def last(*arguments, **options):
    print("begun", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
{module}.{function} = last
from randlora_jax.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("to-lora", "to_lora", "replacing_files"),
        ("merge", "merge", "plan"),
        ("convert", "convert", "write_adapter"),
    ],
)
def test_interrupted_in_one_long_call(sources, tmp_path, name, module, function):
    program = LONG_CALL.format(module=module, function=function)
    words = [*command(name, sources, tmp_path / "out"), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program, *words], **pipes)
    assert process.stderr.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    status, out, said = end_of(process)
    assert time.monotonic() - start < 2  # it promises one, on a machine that is not busy
    assert status == 130 and said == "randlora-jax: interrupted\n"
    assert json.loads(out)["error"] == "interrupted"
    assert not os.listdir(tmp_path)


def test_interrupted_while_copies_are_compared(tmp_path):
    """A file of 6 GB of zeros; of holes, so that it takes no room on the disk."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    r, side = 32, 4096
    shapes = {"A": [r, 1, side], "B": [side, side // r, r]}
    shapes |= {"gamma": [side // r, side], "lambda": [r, side // r]}
    header, end = {}, 0
    for layer in range(90):
        for part, shape in shapes.items():
            start, end = end, end + 4 * prod(shape)
            key = f"base_model.model.layers.{layer}.q_proj.randlora_{part}"
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(adapter / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {"peft_type": "RANDLORA", "r": r, "randlora_alpha": r, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    process = run("compact", str(adapter), str(tmp_path / "out"))
    counts = Path("/proc", str(process.pid), "io")
    while process.poll() is None and int(counts.read_text().split()[1]) < 4e8:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be interrupted"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    status, _, said = end_of(process)
    assert time.monotonic() - start < 2
    assert status == 130 and said == "randlora-jax: interrupted\n"
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("name", ["compact", "merge", "to-lora"])
def test_an_interrupted_command_leaves_all_or_nothing(sources, tmp_path, name):
    """At file operations all over the run."""
    assert main(command(name, sources, tmp_path / "whole")) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    step, found = 0, set()
    while True:
        out = tmp_path / f"{step}" / "out"
        words = command(name, sources, out)
        process = PROCESSES.Process(target=command_and_die, args=(words, step, signal.SIGINT))
        process.start()
        process.join()
        assert process.exitcode in (0, 130), step
        left = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert left in ({}, whole), step
        assert not list(out.parent.glob(".*")), step
        found.add(bool(left))
        if process.exitcode == 0:
            break
        step += 3
    assert step > 20 and found == {True, False}


def test_an_interrupt_is_told_in_json(sources, tmp_path, capsys, monkeypatch):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(compact_module, "open_adapter", interrupt)
    status, report = ask(capsys, *command("compact", sources, tmp_path / "out"))
    assert status == 130
    assert report == {
        "good": False,
        "error": "interrupted",
        "source": str(sources / "adapter"),
        "target": str(tmp_path / "out"),
        "warnings": [],
    }


# JSON.


@pytest.mark.parametrize(
    "words",
    [
        ["--json"],
        ["explode", "--json"],
        ["inspect", "--json"],
        ["inspect", "absent", "--json"],
        ["inspect", "{adapter}", "--unknown", "--json"],
        ["inspect", "{adapter}", "--js", "--base"],
        ["inspect", "{adapter}", "--plot", "x.png", "--json"],
        ["compact", "{adapter}", "--json"],
        ["to-lora", "{adapter}", "--base", "{base}", "out", "--rank", "zero", "--json"],
        ["merge", "--json", "{adapter}", "--base", "{adapter}/adapter_config.json", "out"],
        ["convert", "{adapter}", "out", "--to", "nowhere", "--json"],
        ["convert", "{adapter}", "out", "--to", "jax", "--json"],
    ],
)
def test_misuse_is_told_in_json(sources, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    places = {"adapter": sources / "adapter", "base": sources / "base"}
    status = main([word.format(**places) for word in words])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert status == 2 and report["good"] is False and report["warnings"] == []
    assert printed.err.splitlines()[-1] == f"randlora-jax: {report['error']}"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_every_report_has_places_and_warnings(sources, tmp_path, capsys, name):
    adapter = tmp_path / "adapter"
    save_adapter("llama", sources / "base", adapter, target_modules=TARGETS)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"a_new_field": 1}))
    places = {"source": str(adapter)} | (
        {"target": str(tmp_path / "out")} if name in WRITES else {}
    )
    for status in (0, 2) if name in WRITES else (0,):
        words = command(name, sources, tmp_path / "out", adapter)
        found = main([*words, "--json"])
        printed = capsys.readouterr()
        report = json.loads(printed.out)
        assert found == status and report["good"] is (status == 0)
        assert {key: report[key] for key in places} == places
        assert all(f"randlora-jax: warning: {text}" in printed.err for text in report["warnings"])
        told = any("a_new_field" in text for text in report["warnings"])
        assert told is (status == 0)  # what may not be overwritten is seen before all else
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    words = command(name, sources, tmp_path / "other", adapter)
    status, report = ask(capsys, *words)
    assert status == 1 and str(weights) in report["error"] and report["good"] is False
    assert report["source"] == str(adapter)


# The network.

FORBID = """
import sys
tried = []
def see(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        tried.append((event, arguments[1:]))
        raise OSError("no network here")
sys.addaudithook(see)
from randlora_jax.commands.main import main
for words in {lines}:
    status = main(words)
    assert status == 0, (status, words)
assert not tried, tried
import socket
try: socket.create_connection(("localhost", 9))
except OSError: pass
assert tried
"""


def test_no_command_touches_the_network(sources, tmp_path):
    lines = [command(name, sources, tmp_path / name) for name in [*WRITES, *READS]]
    assert len(lines) == len(COMMANDS)
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    program = FORBID.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
