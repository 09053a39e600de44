"""Some thousands of cases of the fuzz harness (`make fuzz` runs more), and what it would catch."""

from pathlib import Path

import fuzz_adapters
import numpy as np
import pytest
from fuzz_adapters import MUTATIONS, Failure, fuzzer
from promise_mutations import HARMLESS

pytestmark = pytest.mark.torch

CASES = 4200
SEED = 1  # `make fuzz` begins with 0


@pytest.fixture(scope="module")
def runner():
    with fuzzer(SEED) as runner:
        yield runner


def test_thousands_of_damaged_adapters(runner):
    for number in range(CASES):
        try:
            runner.run(number)
        except Exception as error:
            error.add_note(f"python tests/fuzz_adapters.py --seed {SEED} --only {number}")
            raise
    for name in MUTATIONS:
        assert runner.outcomes[name, "read" if name in HARMLESS else "refused"] > 5
    for end in ("refused", "read"):
        assert runner.outcomes["from_pretrained", end] > 5


def reads(runner, monkeypatch, reader) -> None:
    """Let the harness run a case that must be refused, read by a faulty reader."""
    number = next(n for n in range(1, 1000) if runner.case(n)[:2] == ("appended", True))
    monkeypatch.setattr(fuzz_adapters, "read_adapter", reader)
    runner.run(number)


def test_a_reader_that_sees_nothing_is_caught(runner, monkeypatch):
    with pytest.raises(Failure, match="appended: was read as if nothing were wrong"):
        reads(runner, monkeypatch, lambda folder: None)


def test_errors_of_another_kind_are_caught(runner, monkeypatch):
    with pytest.raises(IndexError):
        reads(runner, monkeypatch, lambda folder: [][0])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("broken", "does not begin with the file"),
        ("{folder}: bad", "says too little"),
        ("{folder}: expected a file without \x1b[31m in its names, found one", "for a terminal"),
        ("{folder}: " + "x" * 9999, "for a terminal"),
    ],
)
def test_messages_that_help_nobody_are_caught(runner, monkeypatch, message, complaint):
    def reader(folder: Path):
        raise fuzz_adapters.RandLoraError(message.format(folder=folder))

    with pytest.raises(Failure, match=complaint):
        reads(runner, monkeypatch, reader)


@pytest.mark.parametrize("fault", ["memory", "writing"])
def test_what_a_reader_must_not_do_is_caught(runner, monkeypatch, fault):
    right = fuzz_adapters.read_adapter

    def reader(folder: Path):
        if fault == "memory":
            np.empty(10**9, np.int8)
        else:
            (folder.parent / "written").write_text("x")
        return right(folder)

    with pytest.raises(Failure, match="bytes of memory" if fault == "memory" else "for writing"):
        reads(runner, monkeypatch, reader)
    runner.watch.seen.clear()
