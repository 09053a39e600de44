"""What each field of a configuration may hold.

A check takes a field's name and value and returns the value as it is stored, or raises ConfigError
that names the field, what was expected, what was found and what to do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from numbers import Integral, Real
from typing import Any

from randlora_jax.interop.errors import ConfigError, shown
from randlora_jax.interop.expressions import AT_OR_IN_MODULE, LAYER_NUMBER, fault
from randlora_jax.interop.strict_json import MAX_DEPTH, JsonObject, is_too_deep

ALL_LINEAR = "all-linear"

Check = Callable[[str, Any], Any]


def refusal(name: str, expected: str, found: object, remedy: str = "") -> ConfigError:
    """The error of a field that holds something else than expected."""
    return ConfigError(f"{name}: expected {expected}, found {shown(found)}. {remedy}".rstrip())


def integer(low: int, high: int | None, expected: str, remedy: str) -> Check:
    """A whole number from `low` to `high`, no bool."""

    def check(name: str, value: Any) -> int:
        # True is an int to Python, and never what was meant here.
        if isinstance(value, Integral) and not isinstance(value, bool):
            number = int(value)
            if low <= number and (high is None or number <= high):
                return number
        raise refusal(name, expected, value, remedy)

    return check


def number(accepts: Callable[[float], bool], expected: str, remedy: str) -> Check:
    """A finite number that `accepts` likes, no bool."""

    def check(name: str, value: Any) -> int | float:
        if isinstance(value, Real) and not isinstance(value, bool):
            number = int(value) if isinstance(value, Integral) else float(value)
            if abs(number) <= sys.float_info.max and accepts(number):  # no NaN, no infinity
                return number
        raise refusal(name, expected, value, remedy)

    return check


def boolean(name: str, value: Any) -> bool:
    """True or False itself."""
    if not isinstance(value, bool):
        raise refusal(name, "True or False", value)
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refusal(name, "a string or None", value)
    return value


def one_of(*choices: str, note: str = "") -> Check:
    """One of some strings, or an Enum whose value is one."""
    expected = "one of " + ", ".join(map(repr, choices)) + note

    def check(name: str, value: Any) -> str:
        plain = value.value if isinstance(value, Enum) else value  # PEFT's TaskType is an Enum
        if not isinstance(plain, str) or plain not in choices:
            raise refusal(name, expected, value)
        return plain

    return check


def _items(name: str, value: Any, expected: str, each: Check) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | set | frozenset):
        raise refusal(name, expected, value)
    items = [each(name, item) for item in value]
    if isinstance(value, set | frozenset):
        items.sort()  # a set has no order that would last
    return tuple(dict.fromkeys(items))


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise refusal(name, "names of modules", value)
    return value


def _pattern(name: str, value: Any, form: str = "{}") -> str:
    """A regular expression that is valid by itself and in the `form` that PEFT puts it into."""
    text = _name(name, value)
    wrong = fault(text) or fault(form.format(text))
    if wrong:
        raise refusal(name, f"a valid regular expression ({wrong})", text)
    return text


def target_modules(name: str, value: Any) -> str | tuple[str, ...]:
    """Names, one regular expression, or "all-linear"."""
    expected = f"a list of module names, a regular expression, {ALL_LINEAR!r} or None"
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        if re.sub(r"[\s_-]", "", value).lower() == "alllinear":
            raise refusal(name, expected, value, f"Write {ALL_LINEAR!r}.")
        return _pattern(name, value)
    names = _items(name, value, expected, _name)
    if ALL_LINEAR in map(str.lower, names):
        raise refusal(name, expected, value, f"Write {ALL_LINEAR!r} alone, without a list.")
    if not names:
        raise refusal(name, expected, value, "None stands for the model type's defaults.")
    return names


def modules_to_save(name: str, value: Any) -> tuple[str, ...]:
    """Names, which PEFT reads as regular expressions, too."""
    if isinstance(value, str):
        raise refusal(name, "a list of module names or None", value, f"Write [{shown(value)}].")
    # PEFT matches targets against these names as patterns, so they must be valid ones.
    each = partial(_pattern, form=AT_OR_IN_MODULE)
    return _items(name, value, "a list of module names or None", each)


def layers_to_transform(name: str, value: Any) -> int | tuple[int, ...]:
    """One number of a layer, or several."""
    expected = "a layer index, a list of layer indexes or None"
    index = integer(0, None, expected, "Layers count from 0; negative ones match nothing in PEFT.")
    if isinstance(value, Integral):
        return int(index(name, value))
    return _items(name, value, expected, index)


def layers_pattern(name: str, value: Any) -> str | tuple[str, ...]:
    """One name before the number of a layer, or several."""
    each = partial(_pattern, form=LAYER_NUMBER)
    if isinstance(value, str):
        return each(name, value) if value else value  # PEFT: an empty one allows any
    return _items(name, value, "a name such as 'layers', a list of names, or None", each)


def json_object(name: str, value: Any) -> JsonObject:
    """A dict that JSON can hold."""
    if not isinstance(value, Mapping):
        raise refusal(name, "a JSON object (a dict)", value)
    if any(map(is_too_deep, value.values())):
        raise ConfigError(f"{name}: expected at most {MAX_DEPTH} levels of nesting, found more.")
    try:
        return JsonObject(value)
    except TypeError as error:
        raise refusal(name, "only values that JSON can hold", value, f"{error}.") from error


def optional(check: Check) -> Check:
    """What `check` takes, or None."""
    return lambda name, value: None if value is None else check(name, value)
