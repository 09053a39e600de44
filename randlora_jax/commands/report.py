"""What the modules behind the commands share: a report, a progress bar, checks on arguments.

A command is a module with two functions: ``add_parser(commands)``, which describes its arguments,
and ``run(args)``, which does the work and returns a `Report`. `randlora_jax.commands.main` does the
rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm  # type: ignore[import-untyped]

from randlora_jax.interop.base_model import MODEL_CONFIG
from randlora_jax.interop.errors import RandLoraError
from randlora_jax.interop.progress import Advance

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Misuse(RandLoraError):
    """The command was asked for something it must not do; the adapter may be sound."""


@dataclass(frozen=True)
class Report:
    """What a command found or did.

    Attributes:
      text: for people.
      data: the same for machines, made of what JSON can hold.
      good: False if the adapter failed.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    good: bool = True


def command_parser(
    commands: Commands, name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    """The parser of one command; its description shows examples, so its lines are kept."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def named(text: str) -> Path:
    """An argument that names a file or a directory; an empty one would be where one works."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name, found {text!r}")
    return Path(text)


def adapter_directory(text: str) -> Path:
    """An argument that must name a directory, and no base model's."""
    found = _local(text, "adapter")
    if (found / MODEL_CONFIG).exists() and not any(found.rglob("adapter_*")):
        raise argparse.ArgumentTypeError(
            f"{text}: this is a base model; the adapter goes first, the model to --base"
        )
    return found


def model_directory(text: str) -> Path:
    """An argument that must name a base model's directory."""
    return _local(text, "model")


def _local(text: str, what: str) -> Path:
    """An argument that must name a directory; hubs are not asked."""
    found = named(text)
    if found.is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: expected a directory, found a file; give the folder it is in: {found.parent}"
        )
    if not found.is_dir():
        given = f"--base my-{what}" if what == "model" else f"my-{what}"
        raise argparse.ArgumentTypeError(
            f"{text}: no such directory, and a hub name is not fetched: download it first "
            f"(hf download NAME --local-dir my-{what}), and give {given}"
        )
    return found


@contextmanager
def progress(doing: str, total: int) -> Iterator[Advance]:
    """Show on a terminal how many of `total` bytes are done, once it has taken two seconds."""
    with tqdm(
        desc=doing,
        total=total,
        delay=2,
        mininterval=0.5,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=sys.stderr is None or not sys.stderr.isatty(),
    ) as bar:
        yield bar.update


def plain(text: str) -> str:
    """A name from a file as a report prints it: bare, but without what a terminal would obey."""
    text = text if len(text) <= 160 else f"{text[:100]}... ({len(text)} characters)"
    return text if text.isprintable() else ascii(text)


def size(nbytes: int) -> str:
    """A number of bytes as people read it."""
    amount, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:  # what rounds up to 1000 is one of the larger unit
            break
        amount, unit = amount / 1000, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"
