"""`compact` and `merge` are all or nothing: real processes are killed at file operations."""

import multiprocessing
import random
import shutil
import signal
from pathlib import Path

import pytest
from doomed import command_and_die
from peft_side import save_adapter, save_base

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

KILLS = 200  # of each command, over each kind of target
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["randlora_jax.commands.compact", "randlora_jax.commands.merge"])


def ends_by(command: list[str], step: int) -> int:
    """Exit status of a process that runs `command` and is killed at `step`."""
    process = PROCESSES.Process(target=command_and_die, args=(command, step))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def contents(directory: Path) -> dict[str, bytes]:
    """Every file a reader sees, by its path; what a killed process left hidden is not seen."""
    files = (path for path in directory.rglob("*") if path.is_file())
    found = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    return {name: data for name, data in found.items() if ".randlora-" not in name}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and an adapter that nobody changes."""
    folder = tmp_path_factory.mktemp("killed")
    save_base("llama", folder / "base")
    save_adapter("llama", folder / "base", folder / "adapter")
    inner = Path("1_Pooling", "config.json")  # a file that goes along with a merged model
    (folder / "base" / inner).parent.mkdir()
    (folder / "base" / inner).write_text("new")
    shutil.copytree(folder / "base", folder / "an old model")
    (folder / "an old model" / inner).write_text("old")
    return folder


@pytest.mark.parametrize("over", ["an old one", pytest.param("nothing", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["compact", "merge"])
def test_a_killed_command_leaves_all_or_nothing(folders, tmp_path, name, over):
    source = {"compact": folders / "adapter", "merge": folders / "an old model"}[name]
    more = {"compact": [], "merge": ["--base", str(folders / "base")]}[name]

    def command(out: Path) -> list[str]:
        return [name, str(folders / "adapter"), *more, str(out), "--force"]

    assert main(command(tmp_path / "new")) == 0
    old = contents(source) if over == "an old one" else {}
    new = old | contents(tmp_path / "new")  # a model card stays where it was
    assert old != new

    def attempt(step: int) -> tuple[int, dict[str, bytes]]:
        """How the process ended and what a reader then finds."""
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.randlora-saving", ignore_errors=True)
        if old:
            shutil.copytree(source, out)
        status = ends_by(command(out), step)
        return status, contents(out)

    operations = 1  # the number of file operations of a whole run, to a factor of two
    while (end := attempt(operations))[0] != 0:
        operations *= 2
    assert end[1] == new

    moments, killed, seen = random.Random(0), 0, set()
    while killed < KILLS:
        step = moments.randrange(operations)
        status, found = attempt(step)
        if status == 0:
            operations = step  # a whole run has no more than these
            continue
        assert status == -signal.SIGKILL
        killed += 1
        entry = "adapter_config.json" if name == "compact" else "config.json"
        if over == "nothing" and entry not in found:
            seen.add("nothing")  # a reader finds no adapter, no model
        else:
            assert found in (old, new), f"killed at {step}: a mix of two {sorted(found)}"
            seen.add("old" if found == old else "new")
        if killed % 5 == 0:
            assert main(command(tmp_path / "out")) == 0  # and the next one is not hindered
            assert contents(tmp_path / "out") == new
    assert len(seen) == 2, seen
