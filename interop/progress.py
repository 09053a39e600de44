"""How long work tells how far it is, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

Advance: TypeAlias = Callable[[int], object]
"""Told the number of bytes whenever some more are done."""

Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Advance]]
"""From what is being done and its bytes in all to the scope in which it is done."""


def no_bar(nbytes: int) -> None:
    """Tells nobody."""


@contextmanager
def silent(doing: str, total: int) -> Iterator[Advance]:
    """A `Progress` that shows nothing."""
    yield no_bar
