"""Quantised arrays as qwix makes them: known by what they hold, read by the package they are of."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.core.mesh import on_mesh
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

    On a mesh they lie as its integers do.

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
    sharding = on_mesh(held.qvalue)
    numbers = jax.jit(read, out_shardings=sharding)(held) if sharding else jnp.asarray(read(held))
    if numbers.shape != held.qvalue.shape:
        raise ConfigError(
            f"{dotted(path)!r}: {package}.dequantize gives {numbers.shape}, expected the shape of "
            f"its integers, {held.qvalue.shape}"
        )
    return numbers


_LORA = "_lora_a"  # how qwix names what its LoraProvider adds


def unquantised_class(kind: type) -> type:
    """The class of which qwix made one that quantises; else `kind` itself."""
    return getattr(kind, "_unquantized_type", kind)


def quantises(kind: type) -> bool:
    """Whether qwix made it of another class: while it runs, operations in it are qwix's."""
    return unquantised_class(kind) is not kind


def quantiser_around(kinds: Iterable[type]) -> type | None:
    """The innermost class that quantises, which decides what a layer's operations are.

    Args:
      kinds: of a layer and of the modules around it, outwards.
    """
    return next(filter(quantises, kinds), None)


def refuse_rounding(module: Path, kind: type, arrays: Iterable[Path]) -> None:
    """Nothing, if a module whose class quantises holds arrays that are quantised, or qwix's LoRA.

    Args:
      module: where it is.
      arrays: where the model's arrays are.

    Raises:
      ConfigError: it holds none.
    """
    if not quantises(kind):
        return
    held = [path for path in arrays if path[: len(module)] == module]
    quantised = any(path[-len(INTEGERS) :] == INTEGERS for path in held)
    if not quantised and not any(str(path[-1]).endswith(_LORA) for path in held):
        name = f"{dotted(module)!r}, a {kind.__name__}," if module else f"this {kind.__name__}"
        raise ConfigError(
            f"{name} was made by qwix.quantize_model and holds no quantised array: it rounds float "
            "weights whenever it runs (as with a QtProvider), and would round away what an adapter "
            "adds to them; or none of its rules matches. Quantise the weights first (with a "
            "PtqProvider; for linen, with qwix.quantize_params, too), or wrap the model that it "
            "was made of"
        )
