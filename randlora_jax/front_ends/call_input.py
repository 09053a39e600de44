"""A layer's input among the arguments of its call: by position or keyword, first or not."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax.core.contraction import Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.layer_call import Run, RunningLayer
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
    """The first array of floating numbers among the arguments, in the order of the signature.

    Where there is none: the first of integers or booleans, which layers make floats of.
    """
    order: list[int | str] = list(range(len(args)))
    parameters = inspect.signature(call).parameters if kwargs else {}
    order += [name for name in parameters if name in kwargs]
    order += [name for name in kwargs if name not in parameters]
    given = {place: args[place] if isinstance(place, int) else kwargs[place] for place in order}
    for is_input in (_is_float, _is_integer):
        for place, value in given.items():
            if is_input(value):
                return CallInput(_array_in(value), with_input((args, kwargs), place, None), place)
    return None


def _array_in(value: Any) -> Any:
    """The array of an object that stands for one, as an nnx.Variable does; an array itself."""
    if isinstance(value, jax.Array) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def _is_float(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)


def _is_integer(value: Any) -> bool:
    """Whether it is an array of integers or booleans, and no single one."""
    kinds = jnp.integer, jnp.bool_
    return getattr(value, "ndim", 0) > 0 and any(jnp.issubdtype(value.dtype, k) for k in kinds)


def with_input(arguments: Arguments, place: int | str, x: Any) -> Arguments:
    """The arguments of a call with `x` at `place`."""
    args, kwargs = arguments
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: x}


def running_layer(
    module: Any,
    name: str,
    kernel: tuple[Kernel, Contraction | None],
    scale: jax.Array | None,
    x: jax.Array,
    function: tuple[Run, Sequence[jax.Array]],
) -> RunningLayer:
    """A layer that is called with `x`.

    Args:
      name: of the layer, for messages.
      kernel: of the layer, and what it computes.
      scale: the kernel's, where it is quantised.
      function: the layer as one of its kernel and its input, and whatever else it reads.
    """
    held, call = kernel
    stated = dtype_of(module)
    dtype = held.promoted(x, scale) if stated is None else stated
    return RunningLayer(name, *function, held, call, dtype, precision_of(module))


def dtype_of(layer: Any) -> DTypeLike | None:
    """The dtype a layer promotes its input and kernel to; None if it states none.

    Flax's layers state it as `dtype`. A layer of another make may call by that name what its kernel
    is stored in, integers or floats of 8 bits, or hold a word of its own: nothing is said by those.
    """
    stated = getattr(layer, "dtype", None)
    if stated is None:
        return None
    try:
        dtype = jnp.dtype(stated)
    except TypeError:
        return None
    return dtype if holds_sums(dtype) else None


def precision_of(layer: Any) -> str | None:
    """The precision of a layer's products, by JAX's name for it; None if it states none.

    Flax's layers state it as `precision`, for both sides or for each. Nothing is said by another
    word that a layer of another make may have there, nor by two that differ.
    """
    stated = getattr(layer, "precision", None)
    if isinstance(stated, tuple) and len(set(stated)) == 1:
        stated = stated[0]
    if isinstance(stated, jax.lax.Precision):
        stated = stated.name.lower()
    if isinstance(stated, jax.lax.DotAlgorithmPreset):
        stated = stated.name
    if not isinstance(stated, str):
        return None
    try:
        with jax.default_matmul_precision(stated):
            return stated
    except ValueError:
        return None
