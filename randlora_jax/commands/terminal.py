"""What a command prints: its report on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress


class NotPrinted(Exception):
    """A report could not be written to where stdout leads.

    Attributes:
      status: the exit status that says so.
    """

    def __init__(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            super().__init__("whoever was to read the report has stopped reading")
            self.status = 141  # what a shell gives for SIGPIPE
        else:
            super().__init__(f"the report could not be written: {error.strerror}")
            self.status = 2


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json is among the arguments, in full or as argparse lets it be shortened."""
    return any(len(word) > 2 and "--json".startswith(word) for word in arguments)


def put(text: str) -> None:
    """Print a report, all of it, with ``\\x..`` in place of letters that the terminal lacks.

    Raises:
      NotPrinted: not all could be written, and the rest is dropped.
    """
    if sys.stdout is None:  # closed before Python began
        return
    try:
        print(_in_its_letters(text, sys.stdout), flush=True)
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python tries again as it ends, and complains
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise NotPrinted(error) from error


def tell(text: str) -> None:
    """Print a line on stderr; where it cannot be written, there is nobody to tell."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(_in_its_letters(text, sys.stderr), file=sys.stderr, flush=True)


def _in_its_letters(text: str, stream: object) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
