"""Every error this library raises on purpose, how it warns, and how both write what they found."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Collection, Iterable
from itertools import islice


class RandLoraError(ValueError):
    """Something about an adapter, its configuration or its files is wrong."""


class ConfigError(RandLoraError):
    """A configuration asks for something impossible or contradictory."""


class TargetError(RandLoraError):
    """The layers an adapter names and the layers a model has do not fit together."""


class AdapterFileError(RandLoraError):
    """An adapter's files are missing, damaged, incomplete or not what they say."""


# Where a warning must not point: this library, and what stands between it and the user's line.
_PASSED = ("randlora_jax", "contextlib", "dataclasses", "functools", "jax", "flax")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn about the line of the user's program that led here, however deep in the library.

    (`warnings.warn` counts frames instead, and the number is another for every way here; its
    ``skip_file_prefixes`` came with Python 3.12.)
    """
    frame = sys._getframe()
    while frame.f_back is not None and _module(frame.f_globals).split(".")[0] in _PASSED:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=_module(frame.f_globals),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _module(variables: dict[str, object]) -> str:
    """The name of the module whose global variables these are."""
    return str(variables.get("__name__"))


def shown(value: object) -> str:
    """`value` for a message: as Python writes it, all in printable letters, a few lines at most."""
    if isinstance(value, str) and len(value) > 160:
        return f"{value[:100]!r}... ({len(value)} characters)"
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deep to be shown"
    return text if len(text) <= 240 else f"{text[:160]}... ({len(text)} characters)"


def listed(names: Collection[str], most: int = 8) -> str:
    """The first of some names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, islice(names, most))) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """The names in `known` closest to `name` for a message, and how many more there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 3, 0) or known
    return listed([*near, *known[len(near) :]], 3)
