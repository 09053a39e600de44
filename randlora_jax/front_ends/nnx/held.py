"""What an nnx module holds in an array's place: a Variable, an array as it is, or a quantised one.

qwix puts a quantised array where a Param was, with Params in it. A linen module that it quantised,
inside an nnx one, has it in a Param. A module of the user's may hold one as `qwix.quantize` makes
it, in a list or dict too.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax.models.names import Path
from randlora_jax.models.quantised import arrays_in, integers_in, is_quantised, scale_of

# Asked of types: a wrapper around a whole model that is one says that it is of its class.
_LISTS = (nnx.List, list, tuple)
_CONTAINERS = (*_LISTS, nnx.Dict, dict)


def raw(held: Any) -> Any:
    """The value of a Variable; anything else itself."""
    return held.get_raw_value() if isinstance(held, nnx.Variable) else held


def is_container(value: Any) -> bool:
    """Whether what `value` holds belongs to the module around it."""
    return issubclass(type(value), _CONTAINERS)


def held_by(holder: Any) -> Iterator[tuple[Path, Any]]:
    """The Variables and quantised arrays that a module, or a container in it, holds itself."""
    for path, value in _values_in(holder):
        if isinstance(value, nnx.Variable) or _is_quantised(value):
            yield path, value


def constants_of(module: Any) -> Iterator[tuple[Path, Any]]:
    """The arrays of floats that a module holds as they are, in no Variable."""
    for path, value in _values_in(module):
        if isinstance(value, jax.Array | np.ndarray) and jnp.issubdtype(value.dtype, jnp.floating):
            yield path, value


def _values_in(holder: Any) -> Iterator[tuple[Path, Any]]:
    """What a module, or a container, holds itself."""
    if issubclass(type(holder), _LISTS):
        items: Any = enumerate(holder)
    elif isinstance(holder, dict):
        items = holder.items()
    else:
        items = vars(holder).items()
    for name, value in items:
        if is_container(value):
            for leaf, held in _values_in(value) if name != "_pytree__nodes" else ():
                yield (name, *leaf), held
        else:
            yield (name,), value


def _is_quantised(value: Any) -> bool:
    return not isinstance(value, nnx.Module) and is_quantised(value)


def arrays_of(held: Any) -> dict[Path, Any]:
    """The arrays of a Variable or a quantised array, by their paths in it."""
    return {path: raw(array) for path, array in arrays_in(raw(held)).items()}


def in_jax(array: Any) -> Any:
    """An array of JAX's in place of one of NumPy's, which `nnx.update` puts into Variables."""
    return jnp.asarray(array) if isinstance(array, np.ndarray) else array


def of_numpy(variable: nnx.Variable[Any]) -> bool:
    """Whether a Variable holds an array of NumPy's."""
    return any(isinstance(array, np.ndarray) for array in arrays_of(variable).values())


def of_jax(variable: nnx.Variable[Any]) -> Any:
    """The value of a Variable with JAX's arrays for NumPy's."""
    return jax.tree.map(in_jax, variable.get_raw_value())


def quantised_in(holder: Any) -> dict[Path, Any]:
    """What holds each quantised array of a module, a Variable or itself; by its integers' path."""
    found = {}
    for path, held in held_by(holder):
        if place := integers_in(raw(held)):
            found[(*path, *place)] = held
    return found


def plain(held: Any) -> Any:
    """A quantised array of arrays alone, without the Variables in it and around it."""
    is_variable = {"is_leaf": lambda x: isinstance(x, nnx.Variable)}
    return jax.tree.map(raw, raw(held), **is_variable)


def place_of(leaf: Path, state: Mapping[Path, Any]) -> Path:
    """Where in `state` lies what holds the array at `leaf`: there, or around it."""
    return next(leaf[:i] for i in range(len(leaf), 0, -1) if leaf[:i] in state)


def array_at(leaf: Path, state: Mapping[Path, Any]) -> jax.Array:
    """The array at `leaf` of the state of a module."""
    place = place_of(leaf, state)
    array: jax.Array = arrays_of(state[place])[leaf[len(place) :]]
    return array


def scale_at(leaf: Path, state: Mapping[Path, Any]) -> jax.Array | None:
    """The scales of a quantised array whose integers are at `leaf` of a module's state; or None."""
    place = scale_of(leaf)
    return array_at(place, state) if place else None
