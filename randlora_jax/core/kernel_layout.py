"""Kernels of any rank seen as (in, out) matrices.

That is all the core needs to know about a layer: "run it with W + delta_W" works for every type.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import jax
import jax.numpy as jnp

from randlora_jax.interop.errors import ConfigError, shown


@dataclass(frozen=True)
class KernelLayout:
    """How the axes of a kernel form matrices.

    Args:
      axes: one letter for each: ``i`` belongs to the input, ``o`` to the output and ``s`` stacks
        layers. ``"i o"`` is a Dense kernel, ``"o i"`` a transposed one, ``"i o o"`` a projection to
        (heads, head_dim), ``"s i o"`` the kernels of scanned layers.

    Raises:
      ConfigError: a letter other than i, o, s, or no input or no output axis; no string.
    """

    axes: str

    def __post_init__(self) -> None:
        letters = self.axes.replace(" ", "") if isinstance(self.axes, str) else ""
        if "?" in letters:
            raise ConfigError(
                f"kernel layout {shown(self.axes)}: put a letter for each ?, i (in), o (out) or s "
                "(stack): what the axes of a kernel mean, its shape does not tell"
            )
        if set(letters) - set("ios") or not {"i", "o"} <= set(letters):
            raise ConfigError(
                f"kernel layout {shown(self.axes)}: expected one letter per kernel axis out of i "
                "(in), o (out) and s (stack), with at least one i and one o, such as 'i o' for a "
                "Dense kernel"
            )
        object.__setattr__(self, "axes", letters)

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """(stack extents, in, out) of a kernel of `shape`.

        Raises:
          ConfigError: it has another number of axes.
        """
        if len(shape) != len(self.axes):
            raise ConfigError(
                f"kernel layout {self.axes!r} describes {len(self.axes)} axes, the kernel has "
                f"shape {shape}"
            )
        pick = {c: [n for a, n in zip(self.axes, shape, strict=True) if a == c] for c in "ios"}
        return tuple(pick["s"]), math.prod(pick["i"]), math.prod(pick["o"])

    def out_sizes(self, shape: tuple[int, ...]) -> list[int]:
        """The out axes' extents of a kernel of `shape`."""
        return [n for side, n in zip(self.axes, shape, strict=True) if side == "o"]

    def within(self, whole: tuple[int, ...], shape: tuple[int, ...]) -> "KernelLayout":
        """The layout inside scans that took some stack axes of a kernel; see `axes_left`."""
        return self.of(self.axes_left(whole, shape))

    def of(self, axes: tuple[int, ...]) -> "KernelLayout":
        """The layout of these of its axes alone."""
        return KernelLayout("".join(self.axes[i] for i in axes))

    def axes_left(self, whole: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of a kernel of shape `whole` that are left inside scans over stack axes.

        Args:
          shape: what they left of it.

        Raises:
          ConfigError: which axes were taken cannot be told from the extents.
        """
        every = self._left_by_scans(len(shape))
        left: dict[str, tuple[int, ...]] = {}
        for kept in every:
            if [whole[i] for i in kept] == list(shape):
                left.setdefault("".join(self.axes[i] for i in kept), kept)
        if len(left) > 1:
            raise ConfigError(
                f"kernel layout {self.axes!r} of shape {whole}: scans left {shape}, which may be "
                f"any of {sorted(left)}; adapt layers of such a stack in a params pytree"
            )
        for kept in left.values():
            return kept
        if every:
            return every[0]  # a shard's own extents
        return tuple(i for i, axis in enumerate(self.axes) if axis != "s")

    def without_stacks(self, ndim: int) -> list["KernelLayout"]:
        """The layouts of `ndim` axes that scans over stack axes may leave."""
        if ndim > len(self.axes):
            return []
        left = ("".join(self.axes[i] for i in kept) for kept in self._left_by_scans(ndim))
        return [KernelLayout(axes) for axes in dict.fromkeys(left)]

    def _left_by_scans(self, ndim: int) -> list[tuple[int, ...]]:
        """Every choice of `ndim` axes that scans over stack axes may leave, the last ones first."""
        stacks = [i for i, axis in enumerate(self.axes) if axis == "s"]
        return [
            tuple(i for i in range(len(self.axes)) if i not in gone)
            for gone in combinations(stacks, len(self.axes) - ndim)
        ]

    def along_stack(self, stacked: jax.Array) -> jax.Array:
        """(*stack, a, b) with its stack axes where a kernel has them, for scans to take.

        Axes of extent 1 fill up, so that they are there counted from the end, too.
        """
        stacks = [i for i, axis in enumerate(self.axes) if axis == "s"]
        if not stacks:
            return stacked
        spare = (1,) * (len(self.axes) - stacked.ndim)
        return jnp.moveaxis(stacked.reshape(*stacked.shape, *spare), range(len(stacks)), stacks)

    def stack_first(self, array: jax.Array) -> jax.Array:
        """The inverse of `along_stack`, of what scans left."""
        stacks = [i for i, axis in enumerate(self.axes) if axis == "s"]
        if stacks == list(range(len(stacks))) and array.ndim == len(stacks) + 2:
            return array  # as nearly all lie: nothing to trace
        moved = jnp.moveaxis(array, stacks, range(len(stacks)))
        return moved.reshape(moved.shape[: len(stacks) + 2])

    def splits(self, whole: "KernelLayout") -> bool:
        """Whether this is `whole`, but for out axes of it that are taken for a stack of layers."""
        pairs = list(zip(self.axes, whole.axes, strict=False))
        return len(self.axes) == len(whole.axes) and all(
            mine == theirs or (mine, theirs) == ("s", "o") for mine, theirs in pairs
        )

    def to_kernel(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """(*stack, in, out) laid out as a kernel of `shape`."""
        order = [i for c in "sio" for i, a in enumerate(self.axes) if a == c]
        grouped = matrix.reshape([shape[i] for i in order])
        return jnp.transpose(grouped, [order.index(i) for i in range(len(order))])

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """A kernel as (*stack, in, out); the inverse of `to_kernel`."""
        stack, n_in, n_out = self.sizes(kernel.shape)
        order = [i for c in "sio" for i, a in enumerate(self.axes) if a == c]
        return jnp.transpose(kernel, order).reshape(*stack, n_in, n_out)
