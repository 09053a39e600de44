"""The ``randlora-jax`` command: adapter files, for people who may never train in JAX.

Every command is a module of `randlora_jax.commands` (see its `report` module for what such a
module must have). Describing the commands, and those that only handle adapter files, import
neither jax nor torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TextIO

from randlora_jax import __version__
from randlora_jax.commands.report import Misuse, Report
from randlora_jax.interop.errors import RandLoraError

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


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(
        prog="randlora-jax",
        description="Look into RandLoRA adapters of PyTorch PEFT and change them.",
        epilog="""
start here:
  randlora-jax inspect my-adapter
  randlora-jax compact my-adapter small
  randlora-jax merge my-adapter --base my-model merged
  randlora-jax compact --help

exit status: 0 good, 1 the adapter fails, 2 the command was misused""",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            report: Report = args.run(args)
        except Misuse as error:
            return _fail(str(error), MISUSE, args.json)
        except RandLoraError as error:
            return _fail(str(error), FAILS, args.json)
        except OSError as error:  # no space, no permission
            return _fail(str(error), MISUSE, args.json)
        except KeyboardInterrupt:
            return _fail("interrupted", 130, args.json)
    print(_json({"good": report.good, **report.data}) if args.json else report.text)
    return GOOD if report.good else FAILS


def _fail(message: str, status: int, as_json: bool) -> int:
    print(f"randlora-jax: {message}", file=sys.stderr)
    if as_json:
        print(_json({"good": False, "error": message}))
    return status


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, indent=2, allow_nan=False)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"randlora-jax: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
