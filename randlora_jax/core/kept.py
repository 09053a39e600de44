"""An array that another one takes the place of for a while, kept in host memory meanwhile."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.mesh import on_host, on_mesh


class Parts:
    """What this process holds, in host memory, of an array that lies on devices of several."""

    def __init__(self, x: jax.Array) -> None:
        self.shape, self.sharding = x.shape, x.sharding
        self.parts = {str(part.index): np.asarray(part.data) for part in x.addressable_shards}

    @property
    def nbytes(self) -> int:
        """Of all parts, each counted once however many devices have it."""
        return sum(part.nbytes for part in self.parts.values())

    def joined(self) -> jax.Array:
        """The array as it lay: every process calls this."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[str(index)]
        )


class Kept:
    """An array's numbers in host memory, of each process its own: nothing is sent.

    And the array itself for as long as somebody else has it, such as another model that shares it.

    Args:
      x: the array.
      instead: what takes its place.

    Attributes:
      known: digests of both; of two that have the same, either does for the other.
    """

    def __init__(self, x: jax.Array, instead: jax.Array) -> None:
        self._numbers = np.asarray(x) if x.is_fully_addressable else Parts(x)
        self._array: Callable[[], jax.Array | None] = weakref.ref(x)
        self.known = _digest(x), _digest(instead)

    @property
    def nbytes(self) -> int:
        """Of this process's memory."""
        return self._numbers.nbytes

    def changed(self, now: Any) -> bool:
        """Whether `now`, which lies in its place, is neither what was put there nor itself.

        Numbers that cannot be looked at, as in a trace, count as what was put there.
        """
        if not isinstance(now, jax.Array) or isinstance(now, jax.core.Tracer) or now.is_deleted():
            return False
        return _digest(now) not in self.known

    def then(self, now: Any, instead: jax.Array) -> "Kept":
        """The same where `instead` takes the place of `now`, which lies there."""
        if self.changed(now):
            return self
        other = copy.copy(self)
        other._array, other.known = self._array, (self.known[0], _digest(instead))
        return other

    def put_back(self, like: jax.Array) -> jax.Array:
        """The array, where `like` lies: the very one, if it is still there."""
        array = self._array()
        if array is not None and not array.is_deleted() and array.sharding == like.sharding:
            return array
        numbers = self._numbers
        whole = numbers.joined() if isinstance(numbers, Parts) else numbers
        return jax.device_put(whole, on_mesh(like))

    def __getstate__(self) -> dict[str, Any]:
        return {"_numbers": self._numbers, "known": self.known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _array=lambda: None)


def _digest(x: jax.Array) -> int:
    """Another number for an array in which a bit is another, however it lies on devices."""
    with jax.ensure_compile_time_eval():
        return int(on_host(_of_bits(x)))


@jax.jit
def _of_bits(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        x = jnp.stack((x.real, x.imag))
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return (bits.astype(jnp.uint32) * (2 * place + 1)).sum(dtype=jnp.uint32)
