"""How often a thing is run to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WARM, STEPS, FEWEST, PATIENCE = 2, 7, 3, 6.0  # runs that are not timed, that are; seconds

TIMING = (
    f"seconds: median of {STEPS} steps after {WARM + 1} (of at least {FEWEST} where they take more "
    f"than {PATIENCE:.0f} s), each waited for"
)


def timed(run: Callable[[], object]) -> tuple[list[float], list[Any]]:
    """Seconds of each run after the warm ones, and what all of them returned.

    `STEPS` are timed; fewer, but never less than `FEWEST`, where they take long.
    """
    returned = [run() for _ in range(WARM)]
    times: list[float] = []
    while len(times) < STEPS and (len(times) < FEWEST or sum(times) < PATIENCE):
        began = time.perf_counter()
        returned.append(run())
        times.append(time.perf_counter() - began)
    return times, returned
