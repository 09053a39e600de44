"""A process that writes a line of JSON for every figure: followed, and stopped in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GLANCE = 0.1  # seconds between two looks at what it wrote


def follow(
    command: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    limit: float,
    on_row: Callable[[dict[str, Any]], None],
) -> str | None:
    """Runs a command and hands over its rows as they come.

    Args:
      log: where its standard error goes; its rows lie beside it.
      limit: seconds, after which it and all that it started are killed.

    Returns:
      Why it did not end well; None if it did.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    to, began, handed = log.with_suffix(".jsonl"), time.monotonic(), 0
    with to.open("w") as rows, log.open("w") as errors:
        process = subprocess.Popen(
            command, env=env, stdout=rows, stderr=errors, start_new_session=True
        )
    try:
        while True:
            over = process.poll() is not None  # before looking, or its last row could be missed
            whole = to.read_text().split("\n")[:-1]
            for line in whole[handed:]:
                on_row(json.loads(line))
            handed = len(whole)
            if over:
                return _why(process.returncode, log)
            if time.monotonic() - began > limit:
                return f"stopped after {limit:.0f} s"
            time.sleep(GLANCE)
    finally:
        _end(process)


def _why(status: int, log: Path) -> str | None:
    if status == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "and said nothing"
    if status > 0:
        return f"ended with status {status}: {last}"
    name = signal.Signals(-status).name
    memory = " (often for want of memory)" if name == "SIGKILL" else ""
    return f"ended by {name}{memory}: {last}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, such as compilers; what has ended is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
