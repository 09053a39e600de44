"""What a command costs, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import NamedTuple

RANDLORA = (sys.executable, "-m", "randlora_jax.commands.main")


class Cost(NamedTuple):
    """Seconds, seconds of processor time, and the peak of memory in MB."""

    seconds: float
    processor: float
    megabytes: float


def cost_of(*command: object) -> Cost:
    """Of a program and its arguments, run to its end; whatever it prints is dropped.

    Raises:
      SystemExit: it failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return Cost(elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)
