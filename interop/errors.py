"""Every error this library raises on purpose: one family, so that a caller can catch it whole."""

import difflib
from collections.abc import Sequence


class RandLoraError(ValueError):
    """Something about an adapter, its configuration or its files is wrong."""


class ConfigError(RandLoraError):
    """A configuration asks for something impossible or contradictory."""


class TargetError(RandLoraError):
    """The layers an adapter names and the layers a model has do not fit together."""


class AdapterFileError(RandLoraError):
    """An adapter's files are missing, damaged, incomplete or not what they say."""


def shown(value: object) -> str:
    """`value` for a message: as Python writes it, and not longer than a few lines."""
    text = repr(value)
    return text if len(text) <= 240 else f"{text[:160]}... ({len(text)} characters)"


def nearest(name: str, known: Sequence[str]) -> str:
    """Names in `known` closest to `name`, for a message."""
    near = difflib.get_close_matches(name, known, 3, 0) or list(known)[:3]
    return ", ".join(map(repr, near)) + (
        f" and {len(known) - len(near)} more" if len(known) > 3 else ""
    )
