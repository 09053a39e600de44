"""JSON that is read strictly, kept unchanged, and written whole or not at all.

Python's reader accepts what other readers refuse (NaN, a key given twice); an adapter's files are
exchanged between programs, so here such text is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.placing import replacing_file

# Levels of lists and objects within each other. What programs write has a few; and Python, which
# takes a step of its stack for each, gives up at some hundreds.
MAX_DEPTH = 64


class JsonObject(Mapping[str, Any]):
    """A JSON object that cannot change, so that it can be hashed and shared."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        for key in items:
            if not isinstance(key, str):
                raise TypeError(f"a JSON object has string keys, found {key!r}")
        self._items = {key: freeze(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def freeze(value: Any) -> Any:
    """The JSON value with tuples for lists and `JsonObject` for dicts.

    Raises:
      TypeError: JSON cannot hold the value.
    """
    if isinstance(value, Mapping):
        return JsonObject(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(f"JSON cannot hold {value!r}")


def thaw(value: Any) -> Any:
    """The reverse of `freeze`: plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


def is_too_deep(value: Any) -> bool:
    """Whether more than `MAX_DEPTH` lists and objects lie within each other in a JSON value."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [x for x in level if isinstance(x, Mapping | list | tuple)]
        level = [y for x in inner for y in (x.values() if isinstance(x, Mapping) else x)]
        if not inner:
            return False
    return True


def parse_object(text: str, where: str, *, finite: bool = True) -> dict[str, Any]:
    """`text` as a JSON object; `where` names its source in errors.

    Args:
      finite: whether NaN and Infinity, which are no JSON, are refused. transformers writes them.

    Raises:
      AdapterFileError: broken JSON, a repeated key, a number that is not finite, a value other
        than an object, or one nested too deep.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise AdapterFileError(
                    f"{where}: the key {shown(key)} is given twice, and readers differ in which "
                    "one they take. Remove one."
                )
            result[key] = value
        return result

    def number(literal: str) -> float:
        value = float(literal)
        if finite and not math.isfinite(value):
            raise AdapterFileError(f"{where}: expected finite numbers, found {literal}.")
        return value

    try:
        value = json.loads(
            text, object_pairs_hook=without_repeats, parse_float=number, parse_constant=number
        )
    except AdapterFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    for key, inner in value.items():
        if is_too_deep(inner):
            raise AdapterFileError(
                f"{where}: {shown(key)}: expected at most {MAX_DEPTH} levels of lists and objects "
                "within each other, found more: it is nested too deep to be meant. Remove it."
            )
    return value


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Args:
      finite: as for `parse_object`.

    Raises:
      AdapterFileError: as `parse_object`, and where the file is missing or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path}: expected UTF-8 text ({error}).") from error
    return parse_object(text, str(path), finite=finite)


def dump_object(value: Mapping[str, Any]) -> str:
    """`value` as ASCII text with sorted keys, the form PEFT writes."""
    return json.dumps(thaw(value), indent=2, sort_keys=True, allow_nan=False)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write `text` to `path`, as `replacing_file` does."""
    with (
        replacing_file(path, overwrite=overwrite) as new,
        open(new, "x", encoding="utf-8", newline="\n") as file,
    ):
        file.write(text)
