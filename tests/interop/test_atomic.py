"""Saving is all or nothing: real processes are killed at every file operation and at any time."""

import multiprocessing
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest
from doomed import adapter_of, refuse_exchange, save_and_die, save_forever
from randlora_jax.interop import atomic
from randlora_jax.interop.atomic import replacing_files
from randlora_jax.interop.config import CONFIG_NAME
from randlora_jax.interop.errors import AdapterFileError, RandLoraError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter

KILLS = 200  # at random moments, for each way of saving
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["randlora_jax.interop.peft_dir"])

# What a user may keep beside an adapter; each file holds its own path.
OTHERS = ["README.md", "logs/a.txt"]

ways = pytest.mark.parametrize(
    "in_place",
    [
        pytest.param(
            False,
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs RENAME_EXCHANGE"),
            id="exchange",
        ),
        pytest.param(True, id="in place"),
    ],
)


def seen_by_us(directory: Path) -> int | None:
    """The version our reader finds, whole; None for nothing."""
    try:
        adapter = read_adapter(directory)
    except AdapterFileError as error:
        assert "found no" in str(error), error
        return None
    version = int(adapter.config.randlora_alpha)
    assert (adapter.layers["lin"][0] == version).all(), "config and weights are of two saves"
    return version


def seen_by_peft(directory: Path) -> int | None:
    """The version PEFT's own functions find, whole; None for nothing."""
    if not (directory / CONFIG_NAME).exists():
        return None  # PEFT raises "Can't find 'adapter_config.json'"
    import peft

    version = int(peft.PeftConfig.from_pretrained(directory).randlora_alpha)
    weights = peft.utils.load_peft_weights(str(directory), device="cpu")
    found = weights["base_model.model.lin.randlora_lambda"]
    assert (found == version).all(), "config and weights are of two saves"
    return version


def lay_out(directory: Path, version: int | None) -> None:
    for name in OTHERS:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    if version is not None:
        write_adapter(directory, adapter_of(version))


def check_after_kill(directory: Path, old: int | None, in_place: bool) -> int | None:
    """What the dead process left is whole, and the next save cleans up; the version found."""
    ours, theirs = seen_by_us(directory), seen_by_peft(directory)
    if old is not None:
        assert ours is not None
    if old is not None and not in_place:
        assert theirs == ours
    else:  # for a few renames PEFT finds the old, then nothing, where we find the new; no mix
        assert theirs is None or theirs <= (ours or 0)
    write_adapter(directory, adapter_of(1))
    assert seen_by_us(directory) == seen_by_peft(directory) == 1
    for name in OTHERS:
        assert (directory / name).read_text() == name
    assert not [*directory.parent.glob(".*randlora*"), *directory.rglob(".*randlora*")]
    return ours


@pytest.mark.torch
@ways
@pytest.mark.parametrize("old", [None, 1])
def test_killed_at_every_file_operation(tmp_path, old, in_place):
    outcomes = []
    for step in count():
        directory = tmp_path / f"{step}" / "adapter"
        lay_out(directory, old)
        process = PROCESSES.Process(target=save_and_die, args=(directory, 2, in_place, step))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        outcomes.append(check_after_kill(directory, old, in_place))
        if process.exitcode == 0:
            break
    assert step > 15
    assert outcomes[0] == old and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, key=lambda version: version == 2), "went back to the old"


@pytest.mark.long  # what is killed at every file operation is killed here at moments between
@pytest.mark.torch
@ways
def test_killed_at_any_time(tmp_path, in_place):
    moments = random.Random(0)
    directory = tmp_path / "adapter"
    lay_out(directory, 1)
    for _ in range(KILLS):
        process = PROCESSES.Process(target=save_forever, args=(directory, 2, in_place))
        process.start()
        while seen_by_us(directory) == 1:  # until its first save
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert check_after_kill(directory, 1, in_place) >= 2


def test_a_reader_never_meets_two_saves_at_once(tmp_path):
    write_adapter(tmp_path / "a", adapter_of(1))
    for in_place in (False, True):
        process = PROCESSES.Process(target=save_forever, args=(tmp_path / "a", 2, in_place))
        process.start()
        seen, reads, end = set(), 0, time.monotonic() + 120
        # on a busy machine the first save may come late: read on until it was seen
        while (reads < 200 or len(seen) < 2) and time.monotonic() < end:
            seen.add(seen_by_us(tmp_path / "a"))
            reads += 1
        process.kill()
        process.join()
        assert None not in seen and len(seen) > 1


def test_what_others_write_meanwhile_is_kept(tmp_path, monkeypatch):
    directory = tmp_path / "a"
    lay_out(directory, 1)
    exchange = atomic._exchange

    def late(one: Path, other: Path) -> None:
        (directory / "new.txt").write_text("new")
        (directory / "logs" / "new").mkdir()
        (directory / "logs" / "a.txt").unlink()
        (directory / "logs" / "a.txt").write_text("replaced")
        exchange(one, other)

    monkeypatch.setattr(atomic, "_exchange", late)
    write_adapter(directory, adapter_of(2))
    assert seen_by_us(directory) == 2
    assert (directory / "new.txt").read_text() == "new"
    assert (directory / "logs" / "new").is_dir()
    assert (directory / "logs" / "a.txt").read_text() == "replaced"


def test_modes_links_and_open_files_survive(tmp_path):
    directory = tmp_path / "real"
    lay_out(directory, 1)
    (directory / "logs").chmod(0o750)
    (directory / "link").symlink_to("nowhere")
    (tmp_path / "alias").symlink_to(directory)
    with open(directory / "README.md", "a") as log:
        write_adapter(tmp_path / "alias", adapter_of(2))
        log.write(" and more")
    assert (tmp_path / "alias").is_symlink() and seen_by_us(directory) == 2
    assert (directory / "README.md").read_text() == "README.md and more"
    assert os.readlink(directory / "link") == "nowhere"
    assert (directory / "logs").stat().st_mode & 0o777 == 0o750


def test_a_process_keeps_its_working_directory(tmp_path, monkeypatch):
    lay_out(tmp_path / "a", 1)
    monkeypatch.chdir(tmp_path / "a" / "logs")
    write_adapter("..", adapter_of(2))
    assert seen_by_us(Path("..")) == 2
    assert Path.cwd() == tmp_path / "a" / "logs"


@ways
def test_files_in_subfolders_are_replaced_with_the_rest(tmp_path, monkeypatch, in_place):
    if in_place:
        monkeypatch.setattr(atomic, "_exchange", refuse_exchange)
    target = tmp_path / "a"
    for name in ("entry", "sub/changed", "sub/deep/kept", "sub/deep/changed"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old")
    for text in ("new", "newer"):
        with replacing_files(target, entry="entry") as staged:
            for name in ("entry", "sub/changed", "sub/deep/changed", "fresh/one"):
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                (staged / name).write_text(text)
        found = {
            str(f.relative_to(target)): f.read_text() for f in target.rglob("*") if f.is_file()
        }
        names = ("entry", "sub/changed", "sub/deep/changed", "fresh/one")
        assert found == {**dict.fromkeys(names, text), "sub/deep/kept": "old"}


def test_two_writers_are_told_apart(tmp_path):
    for old in (None, 1):  # moved into place, then exchanged
        with replacing_files(tmp_path / "a", entry=CONFIG_NAME) as staged:
            with pytest.raises(RandLoraError, match="another process is saving"):
                write_adapter(tmp_path / "a", adapter_of(2))
            assert seen_by_us(tmp_path / "a") == old
            write_adapter(staged, adapter_of(1))
        assert seen_by_us(tmp_path / "a") == 1


@pytest.mark.parametrize("old", [None, 1])
def test_an_error_while_saving_leaves_all_as_it_was(tmp_path, old):
    directory = tmp_path / "a"
    if old is not None:
        lay_out(directory, old)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError), replacing_files(directory, entry=CONFIG_NAME) as staged:
        (staged / CONFIG_NAME).write_text("{}")
        raise RuntimeError("disk on fire")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileNotFoundError), replacing_files(directory, entry=CONFIG_NAME) as staged:
        (staged / "something else").write_text("")
    assert sorted(tmp_path.rglob("*")) == before


@ways
def test_obsolete_files_go_with_the_old_state(tmp_path, in_place, monkeypatch):
    if in_place:
        monkeypatch.setattr(atomic, "_swap", lambda *_: False)
    for name in ("config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "notes"):
        (tmp_path / name).write_text("old")
    patterns = ["*.safetensors"]
    with replacing_files(tmp_path, entry="config.json", obsolete=patterns) as staged:
        for name in ("config.json", "model-1-of-2.safetensors"):
            (staged / name).write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"config.json": "new", "model-1-of-2.safetensors": "new", "notes": "old"}
