"""Saving is all or nothing: real processes are killed at every file operation and at any time."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import peft
import pytest

from randlora_jax.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.errors import AdapterFileError, RandLoraError
from randlora_jax.interop import atomic
from randlora_jax.interop.peft_dir import Adapter, read_adapter, write_adapter

KILLS = int(os.environ.get("RANDLORA_KILLS", "10"))  # at random moments, for each way of saving
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["randlora_jax.interop.peft_dir"])

# What a user may keep beside an adapter; each file holds its own path.
OTHERS = ["README.md", "checkpoint-1/adapter_config.json", "logs/a/b.txt"]
# What Python says before it touches a file or a directory (sys.audit).
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.scandir"}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs RENAME_EXCHANGE")


def adapter_of(version: int, width: int = 4) -> Adapter:
    """An adapter whose config and tensors both tell its version."""
    return Adapter(
        config=RandLoraConfig(
            r=2,
            target_modules=["lin"],
            randlora_alpha=version,
            projection_source="file",
        ),
        layers={
            "lin": (
                np.full((2, width // 2), version, np.float32),
                np.ones((width // 2, width), np.float32),
            )
        },
        bases=(np.ones((2, 1, width), np.float32), np.ones((width, width // 2, 2), np.float32)),
    )


def save(directory: Path, version: int, in_place: bool) -> None:
    if in_place:

        def refuse(one: Path, other: Path) -> None:
            raise OSError("as on a filesystem that cannot exchange directories")

        atomic._exchange = refuse
    write_adapter(directory, adapter_of(version))


def save_and_die(directory: Path, version: int, in_place: bool, step: int) -> None:
    """Be killed just before the file operation number `step`; exit 0 if there are not so many."""
    steps = count()

    def hook(event: str, args: tuple) -> None:
        if event in OPERATIONS and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(directory, version, in_place)
    os._exit(0)


def save_forever(directory: Path, in_place: bool) -> None:
    for version in count(2):
        if in_place:
            save(directory, version, in_place)
        else:
            write_adapter(directory, adapter_of(version, width=256))


def seen_by_us(directory: Path) -> int | None:
    """The version our reader finds, whole; None for nothing."""
    try:
        adapter = read_adapter(directory)
    except AdapterFileError as error:
        assert "found no" in str(error) or "found none" in str(error), error
        return None
    version = int(adapter.config.randlora_alpha)
    assert (adapter.layers["lin"][0] == version).all(), "config and weights are of two saves"
    return version


def seen_by_peft(directory: Path) -> int | None:
    """The version PEFT's own functions find, whole; None for nothing."""
    if not (directory / CONFIG_NAME).exists():
        return None  # PEFT raises, "Can't find 'adapter_config.json'"
    version = int(peft.PeftConfig.from_pretrained(directory).randlora_alpha)
    weights = peft.utils.load_peft_weights(str(directory), device="cpu")
    assert (weights["base_model.model.lin.randlora_lambda"] == version).all(), "mixed"
    return version


def lay_out(directory: Path) -> None:
    for name in OTHERS:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def check_others(directory: Path) -> None:
    for name in OTHERS:
        assert (directory / name).read_text() == name


def leftovers(directory: Path) -> list[Path]:
    return [*directory.parent.glob(".*randlora*"), *directory.rglob(".*randlora*")]


if __name__ == "__main__":
    pass
