"""The arguments of ``randlora-jax``, and how each outcome of a command is told."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from importlib import import_module
from threading import Event
from typing import NoReturn

from randlora_jax import __version__
from randlora_jax.commands.interrupts import INTERRUPTED, leaving_soon
from randlora_jax.commands.report import Misuse, Report
from randlora_jax.commands.terminal import NotPrinted, put, tell, wants_json
from randlora_jax.interop.errors import (
    AdapterFileError,
    ConfigError,
    RandLoraError,
    TargetError,
)

# Modules of randlora_jax.commands, in the order in which --help lists their commands.
COMMANDS = (
    "inspect_adapter",
    "compact",
    "merge",
    "to_lora",
    "verify",
    "convert",
)

GOOD, FAILS, MISUSE = 0, 1, 2
STATUS: dict[type[BaseException], int] = {
    Misuse: MISUSE,
    **dict.fromkeys((ConfigError, TargetError, AdapterFileError), FAILS),
    RandLoraError: MISUSE,  # what stands in the way of a save, or another process that saves
    OSError: MISUSE,  # no space, no permission
    MemoryError: MISUSE,
    KeyboardInterrupt: INTERRUPTED,
}


class _Parser(argparse.ArgumentParser):
    """Leaves to `run` what argparse does itself: printing, and exiting where it is misused."""

    def _print_message(self, message: str, file: object = None) -> None:
        put(message.rstrip())  # of --help and --version

    def error(self, message: str) -> NoReturn:
        tell(self.format_usage().rstrip())
        raise Misuse(message)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = _Parser(
        prog="randlora-jax",
        description="Look into RandLoRA adapters of PyTorch PEFT and change them.",
        epilog="""
start here:
  randlora-jax inspect my-adapter
  randlora-jax compact my-adapter small
  randlora-jax merge my-adapter --base my-model merged
  randlora-jax compact --help

exit status: 0 good, 1 the adapter fails, 2 the command was misused, 130 interrupted""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"randlora-jax {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"randlora_jax.commands.{name}")
        command = module.add_parser(commands)
        command.add_argument("--json", action="store_true", help="report in JSON, for machines")
        command.set_defaults(run=module.run)
    return top


def run(commands: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run one command, print its report, and return its exit status."""
    warned: list[str] = []

    def warn(message: Warning | str, *where: object) -> None:
        warned.append(str(message))
        tell(f"randlora-jax: warning: {message}")

    with leaving_soon(arguments) as interrupted, warnings.catch_warnings():
        warnings.showwarning = warn  # type: ignore[assignment]
        warnings.simplefilter("default", UserWarning)  # part of the report, whatever is set outside
        try:
            status, report = _outcome(commands, arguments, interrupted)
            if wants_json(arguments):
                data = {"good": report.good, **report.data, "warnings": warned}
                put(json.dumps(data, indent=2, allow_nan=False))
            elif report.text:
                put(report.text)
            return status
        except NotPrinted as error:
            tell(f"randlora-jax: {error}")
            return error.status


def _outcome(
    commands: argparse.ArgumentParser, arguments: Sequence[str], interrupted: Event
) -> tuple[int, Report]:
    """The exit status of a command, and its report; an error is told here."""
    places: dict[str, str] = {}
    try:
        args = commands.parse_args(arguments)
        places = _places(args)
        report: Report = args.run(args)
        data = places | report.data
        return GOOD if report.good else FAILS, Report(report.text, data, report.good)
    except (Exception, KeyboardInterrupt) as error:
        found = next((status for kind, status in STATUS.items() if isinstance(error, kind)), None)
        if interrupted.is_set():
            found = INTERRUPTED
        if found is None:
            raise
        message = "interrupted" if found == INTERRUPTED else str(error)
    tell(f"randlora-jax: {message}")
    return found, Report("", {"error": message, **places}, good=False)


def _places(args: argparse.Namespace) -> dict[str, str]:
    """What a command reads and where it writes, in the words of every report."""
    words = {"src": "source", "dir": "source", "dst": "target", "out": "target"}
    return {words[name]: str(place) for name, place in vars(args).items() if name in words}
