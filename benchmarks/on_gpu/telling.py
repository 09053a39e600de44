"""What a process tells whoever follows it (`following.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any


def teller() -> Callable[[dict[str, Any]], None]:
    """Writes a row as a line of JSON to what was standard output.

    From now on whatever libraries print there goes to standard error.
    """
    to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda row: print(json.dumps(row), file=to, flush=True)


def in_a_line(error: Exception) -> str:
    """An error's type, and the first line of what it says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
