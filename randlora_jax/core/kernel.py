"""A layer's kernel, which is asked to take updates and may refuse."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.mesh import Placement, placed, placement_of
from randlora_jax.core.update import Update, at_least_float32, holds_sums
from randlora_jax.interop.errors import ConfigError


@dataclass(frozen=True)
class Kernel:
    """A kernel as its layer holds it.

    Args:
      array: its numbers, or a `jax.ShapeDtypeStruct` where only questions are asked.
      layout: how its axes form matrices.
      placement: where it lies on a mesh; None for anywhere.
      packed: its shape, where the array holds its numbers in another one; None where it is the
        array's.
    """

    array: jax.Array
    layout: KernelLayout
    placement: Placement | None = None
    packed: tuple[int, ...] | None = None

    @classmethod
    def traced(
        cls,
        array: jax.Array,
        layout: KernelLayout,
        sharding: NamedSharding | None,
        packed: tuple[int, ...] | None = None,
    ) -> "Kernel":
        """A kernel in the middle of a call; `sharding` as its model was wrapped.

        How a packed array is cut does not say how its kernel is.
        """
        placement = placement_of(array, layout, sharding, packed=packed is not None)
        return cls(array, layout, placement, packed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel, however its numbers are stored."""
        return self.packed or self.array.shape

    @property
    def refusal(self) -> str | None:
        """Why no update can be added to its numbers, None where one can."""
        if self.packed:
            return (
                f"its kernel {self.packed} is packed into {self.array.dtype} numbers of shape "
                f"{self.array.shape}, which a float update cannot join"
            )
        if holds_sums(self.array.dtype):
            return None
        return f"its kernel holds {self.array.dtype} numbers, which a float update cannot join"

    def promoted(self, x: jax.Array, scale: jax.Array | None = None) -> DTypeLike:
        """What a layer multiplies `x` and its kernel in, by JAX's rules.

        Integers stand for x's, and so do floats of 8 bits, which JAX promotes with nothing; for
        float32 where x is such, too.

        Args:
          scale: of a quantised kernel, whose numbers are of its dtype.
        """
        held = self.array if scale is None else scale
        if not self.packed and holds_sums(held.dtype):
            return jnp.result_type(x, held)
        return x.dtype if holds_sums(x.dtype) else jnp.float32

    def delta(self, updates: Sequence[Update], dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The deltas of `updates`, formed in `dtype`, summed in float32, in the kernel's layout."""
        cut = self.placement.cut if self.placement else None
        each = (update.formed(cut, dtype).astype(jnp.float32) for update in updates)
        return self.layout.to_kernel(sum(each, start=jnp.zeros((), jnp.float32)), self.shape)

    def taking(self, updates: Sequence[Update], dtype: DTypeLike = jnp.float32) -> jax.Array:
        """W + delta: summed in float32, or in what is wider, and rounded once to W's dtype.

        Args:
          dtype: what delta is formed in.

        Raises:
          ConfigError: it refuses.
        """
        if self.refusal:
            raise ConfigError(f"no adapter can be merged into this layer: {self.refusal}")
        wide = self.array.astype(at_least_float32(self.array.dtype))
        whole = wide + self.delta(updates, dtype).astype(wide.dtype)
        return whole.astype(self.array.dtype)


@partial(jax.jit, static_argnums=(2, 3))
def merged(
    array: jax.Array,
    updates: Sequence[Update],
    layout: KernelLayout,
    sharding: NamedSharding | None,
) -> jax.Array:
    """W + delta where W lies, as `Kernel.taking` makes it: on a mesh each device its own part.

    Args:
      array: W.
      sharding: its own; None where it is on no mesh.

    Raises:
      ConfigError: as `Kernel.taking`.
    """
    with jax.default_matmul_precision("highest"):  # what is made once, and kept
        whole = Kernel.traced(array, layout, sharding).taking(updates)
    return placed(whole, sharding) if sharding else whole
