"""Quantised arrays as qwix makes them: known by what they hold, read by the package they are of."""

from collections.abc import Container, Iterable, Mapping
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.core.mesh import on_mesh
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.names import Path, dotted, slashed

INTEGERS, SCALE = "qvalue", "scale"  # what a quantised array has
_AROUND = "array"  # where it lies in what says, besides, how it was quantised

# Where the integers may lie in what stands in an array's place.
PLACES: tuple[Path, ...] = ((_AROUND, INTEGERS), (INTEGERS,))


def integers_in(value: Any) -> Path | None:
    """Where a quantised array has its integers, beside their scales; None for any other value."""
    if isinstance(value, jax.Array):  # nearly every one; asking a tracer for what it lacks is slow
        return None
    for *outer, _ in PLACES:
        held = getattr(value, outer[0], None) if outer else value
        # a layer may have both, but it can be called
        if all(hasattr(held, name) for name in (INTEGERS, SCALE)) and not callable(held):
            return (*outer, INTEGERS)
    return None


def is_quantised(value: Any) -> bool:
    """Whether `value` is a quantised array: it has an array of integers and of their scales."""
    return integers_in(value) is not None


def arrays_in(value: Any) -> dict[Path, Any]:
    """The arrays of what stands in an array's place, by their paths in it: () for a plain one.

    Those of what it may be besides: a quantised array, a dict, list or tuple. None of numbers that
    are no arrays, nor for None, which a model has in place of an array that it lacks.
    """
    if (place := integers_in(value)) is None:
        if hasattr(value, "shape"):
            return {(): value}
        held = value if isinstance(value, Mapping) else {}
        if isinstance(value, list | tuple):
            held = dict(enumerate(value))
        return {(k, *path): x for k, inner in held.items() for path, x in arrays_in(inner).items()}
    held = value.array if len(place) > 1 else value
    found = {name: getattr(held, name, None) for name in (INTEGERS, SCALE, "zero_point")}
    return {(*place[:-1], name): array for name, array in found.items() if array is not None}


def kernel_at(leaf: Path, arrays: Iterable[Path]) -> Path | None:
    """Where a kernel's numbers lie among `arrays`: at `leaf`, or as the integers of what is there.

    Paths are compared as they are written: an index is a number in one and text in the other.
    """
    written = {slashed(path): path for path in arrays}
    places = (slashed((*leaf, *place)) for place in ((), *PLACES))
    return next((written[place] for place in places if place in written), None)


def is_beside_integers(leaf: Path, leaves: Container[Path]) -> bool:
    """Whether an array tells what the integers beside it stand for: their scales, their zero."""
    return leaf[-1] != INTEGERS and (*leaf[:-1], INTEGERS) in leaves


def array_of(integers: Path) -> Path:
    """The path of the quantised array that has its integers there; any other path itself."""
    place = next((place for place in PLACES if integers[-len(place) :] == place), ())
    return integers[: len(integers) - len(place)]


def scale_of(integers: Path) -> Path | None:
    """Where the scales are of the quantised array that has its integers there; else None."""
    return (*integers[:-1], SCALE) if are_integers(integers) else None


def are_integers(leaf: Path) -> bool:
    """Whether the array at `leaf` is, by where it lies, the integers of a quantised one."""
    return array_of(leaf) != leaf


def dequantised(path: Path, value: Any) -> jax.Array:
    """The numbers of a quantised array of plain arrays, in the dtype of its scales.

    On a mesh they lie as its integers do.

    Args:
      path: for messages.

    Raises:
      ConfigError: its package has no public `dequantize`, or that gives another shape.
    """
    held = value if integers_in(value) == (INTEGERS,) else value.array
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
    quantised = any(map(are_integers, held))
    if not quantised and not any(str(path[-1]).endswith(_LORA) for path in held):
        name = f"{dotted(module)!r}, a {kind.__name__}," if module else f"this {kind.__name__}"
        raise ConfigError(
            f"{name} was made by qwix.quantize_model and holds no quantised array: it rounds float "
            "weights whenever it runs (as with a QtProvider), and would round away what an adapter "
            "adds to them; or none of its rules matches. Quantise the weights first (with a "
            "PtqProvider; for linen, with qwix.quantize_params, too), or wrap the model that it "
            "was made of"
        )
