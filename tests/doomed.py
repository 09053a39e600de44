"""What processes run that tests kill; imports little, since each of them imports it."""

import os
import signal
import sys
from itertools import count
from pathlib import Path

import numpy as np
from randlora_jax.interop import atomic
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.peft_dir import write_adapter

from randlora_jax.commands.main import main

# What Python announces (sys.audit) before it touches a file or a directory.
OPERATIONS = {
    "open",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.utime",
}


def adapter_of(version: int, width: int = 4) -> Adapter:
    """An adapter whose config and tensors both tell its version."""
    n = width // 2
    lam, gamma = np.full((2, n), version, np.float32), np.ones((n, width), np.float32)
    return Adapter(
        config=RandLoraConfig(
            r=2, target_modules=["lin"], randlora_alpha=version, projection_source="file"
        ),
        layers={"lin": (lam, gamma)},
        bases=(np.ones((2, 1, width), np.float32), np.ones((width, n, 2), np.float32)),
    )


def refuse_exchange(one: Path, other: Path) -> None:
    """As on a system that cannot exchange two directories."""
    raise OSError("no exchange here")


def forbid_exchange() -> None:
    atomic._exchange = refuse_exchange


def send_before(step: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process sent a signal just before its file operation number `step`."""
    steps = count()

    def hook(event: str, args: tuple) -> None:
        if event in OPERATIONS and next(steps) == step:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def command_and_die(command: list[str], step: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Exit with the command's status where it has not so many file operations."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    send_before(step, number)
    os._exit(main(command))


def save_and_die(
    directory: Path,
    version: int,
    in_place: bool,
    step: int,
    number: signal.Signals = signal.SIGKILL,
) -> None:
    """Exit 0 where saving has not so many file operations, and 130 where it was interrupted."""
    adapter = adapter_of(version)
    if in_place:
        forbid_exchange()
    send_before(step, number)
    try:
        write_adapter(directory, adapter)
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


def save_interrupted(parent: Path, old: int | None, in_place: bool) -> None:
    """Save over version `old`, once for each file operation, in folders numbered like these.

    Before that one Ctrl-C comes. Exits 0 after the first save that has not so many operations.
    """
    os.fsync = lambda handle: None  # no power is lost here, and it takes most of the time
    for step in count():
        folder = parent / str(step) / "a"
        if old is not None:
            write_adapter(folder, adapter_of(old))
        child = os.fork()
        if child == 0:
            save_and_die(folder, 2, in_place, step, signal.SIGINT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 130:
            os._exit(status)


def save_forever(directory: Path, first: int, in_place: bool) -> None:
    """Save one version after the other, each a megabyte, until killed."""
    if in_place:
        forbid_exchange()
    for version in count(first):
        write_adapter(directory, adapter_of(version, width=512))
