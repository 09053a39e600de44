"""A layer's input among the arguments of its call: by position or keyword, first or not."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax.core.update import holds_sums

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call: by position, by keyword


class CallInput(NamedTuple):
    """A layer's input among the arguments of its call.

    Args:
      x: the input.
      rest: the arguments without it.
      place: where it stood: its position, or its keyword.
    """

    x: jax.Array
    rest: Arguments
    place: int | str


def input_of(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallInput | None:
    """The first array of floating numbers among the arguments, in the order of the signature."""
    order: list[int | str] = list(range(len(args)))
    parameters = inspect.signature(call).parameters if kwargs else {}
    order += [name for name in parameters if name in kwargs]
    order += [name for name in kwargs if name not in parameters]
    for place in order:
        value = args[place] if isinstance(place, int) else kwargs[place]
        if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact):
            return CallInput(_array_in(value), with_input((args, kwargs), place, None), place)
    return None


def _array_in(value: Any) -> Any:
    """The array of an object that stands for one, as an nnx.Variable does; an array itself."""
    if isinstance(value, jax.Array) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def with_input(arguments: Arguments, place: int | str, x: Any) -> Arguments:
    """The arguments of a call with `x` at `place`."""
    args, kwargs = arguments
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: x}


def multiplies_in(layer: Any, otherwise: DTypeLike) -> DTypeLike:
    """The dtype a layer promotes its input and kernel to; `otherwise`, if it states none.

    Flax's layers state it as `dtype`. A layer of another make may call by that name what its kernel
    is stored in, integers or floats of 8 bits, or hold a word of its own: nothing is said by those.
    """
    stated = getattr(layer, "dtype", None)
    if stated is None:
        return otherwise
    try:
        dtype = jnp.dtype(stated)
    except TypeError:
        return otherwise
    return dtype if holds_sums(dtype) else otherwise
