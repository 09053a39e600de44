"""Quantised arrays as qwix makes them: known by what they hold, read by the package they are of."""

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.names import Path, dotted

# Where a quantised array holds its integers, and what they are counted in.
INTEGERS = ("array", "qvalue")
SCALE = ("array", "scale")


def is_quantised(value: Any) -> bool:
    """Whether `value` is a quantised array: it has an array of integers and of their scales."""
    held = getattr(value, INTEGERS[0], None)
    return all(hasattr(held, name) for name in (INTEGERS[1], SCALE[1]))


def dequantised(path: Path, value: Any) -> jax.Array:
    """The numbers of a quantised array of plain arrays, in the dtype of its scales.

    Args:
      path: for messages.

    Raises:
      ConfigError: its package has no public `dequantize`, or that gives another shape.
    """
    held = value.array
    package = type(held).__module__.partition(".")[0]
    read = getattr(import_module(package), "dequantize", None)
    if not callable(read):
        raise ConfigError(
            f"{dotted(path)!r} is a {type(held).__name__} of {package}, which has no dequantize(): "
            "keep the adapter beside it, or load the base model unquantised and the adapter into it"
        )
    numbers = jnp.asarray(read(held))
    if numbers.shape != held.qvalue.shape:
        raise ConfigError(
            f"{dotted(path)!r}: {package}.dequantize gives {numbers.shape}, expected the shape of "
            f"its integers, {held.qvalue.shape}"
        )
    return numbers


def unquantised_class(kind: type) -> type:
    """The class of which qwix made one that quantises; else `kind` itself."""
    return getattr(kind, "_unquantized_type", kind)
