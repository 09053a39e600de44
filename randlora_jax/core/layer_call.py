"""A layer that is being called, as a value: whatever decides how it runs, and no array.

Layers that are alike have equal ones, and share a trace (`applying`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import default_matmul_precision
from jax.typing import DTypeLike

from randlora_jax.core.contraction import CallAxes, Contraction, as_output, as_rows, for_each_matrix
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.mesh import Placement, off_mesh
from randlora_jax.core.rows import RowUpdates
from randlora_jax.core.update import Update, formed_in, summed
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.interop.errors import ConfigError

Run = Callable[..., jax.Array]
U = TypeVar("U", Update, RowUpdates)


@dataclass(frozen=True)
class RunningLayer:
    """An untouched layer that is being called.

    Args:
      name: for messages.
      run: (kernel, x, *read) -> its output, bias and dtype rules included. It is hashed and
        compared, and closes over no array: layers with equal ones are traced once.
      read: every array that it reads besides.
      kernel: as it holds it.
      contraction: what it computes, as a sum over axes of x; None where it is anything else.
      dtype: what it multiplies in.
      precision: of its products, by the name that ``jax.default_matmul_precision`` has for it; None
        for JAX's own.
    """

    name: str
    run: Run
    read: Sequence[jax.Array]
    kernel: Kernel
    contraction: Contraction | None
    dtype: DTypeLike
    precision: str | None = None


class Arguments(NamedTuple):
    """What a layer's output depends on, apart from the updates.

    kernel: its array; x: its input; seen: what each adapter sees in place of x where it drops some
    of it, else None; read: whatever else the layer reads.
    """

    kernel: jax.Array
    x: jax.Array
    seen: Sequence[jax.Array | None]
    read: Sequence[jax.Array]


@dataclass(frozen=True, eq=False)
class _OneOff:
    """A `Run` that is like no other, since what it holds cannot be compared."""

    run: Run

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        """What `run` returns."""
        return self.run(*arrays)


def comparable(run: Run) -> Run:
    """`run` itself if it can be hashed, else the same function, equal to no other."""
    try:
        hash(run)
    except TypeError:
        return _OneOff(run)
    return run


class _NotTheSum(ConfigError):
    """A layer does not compute what its type is said to."""


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Within, such an error gets the name of the layer, which a trace that layers share lacks."""
    try:
        yield
    except _NotTheSum as error:
        raise ConfigError(f"layer {layer!r}: {error}") from None


def _not_its_input(
    layer: str, x: tuple[int, ...], kernel: Kernel, contraction: Contraction
) -> ConfigError:
    """What to say of an input of shape `x` that a kernel does not take."""
    axes, shape = kernel.layout.axes, kernel.shape
    by = f"equation {contraction.equation!r}" if contraction.equation else f"layout {axes!r}"
    return ConfigError(
        f"layer {layer!r} got x of shape {x}, and its kernel of shape {shape} takes "
        f"{contraction.input_of(kernel.layout, shape)} by its {by}. Where the layer itself takes "
        "such an x, its type says otherwise than it computes: state the layout in which i is the "
        "axis that x has, too, layer_types={...: LayerType(KernelLayout('i o'), leaf=...)}, or its "
        "equation, of_einsum(equation, leaf=...), or call=None where it is no such product"
    )


@dataclass(frozen=True)
class LayerCall:
    """What decides how a layer is run, but for the way of each pass: a value without arrays.

    Args:
      run: the layer.
      layout: of its kernel.
      placement: of its kernel, and of the rows of this call.
      axes: of this call; None where the layer is no contraction.
      dtype: what it multiplies in.
      merge_rows: multiply with the axes of rows merged to one. XLA's CPU compiler sums over one of
        them as it lies, but first transposes a copy to sum over several, as the gradient of delta
        does. On a mesh such axes may be cut, and cannot be merged in place.
      packed: the shape of its kernel, where that is not its array's.
      returns: the shape of its output, if it is the contraction that it is said to be.
      precision: of its products; None for JAX's own.
    """

    run: Run
    layout: KernelLayout
    placement: Placement | None
    axes: CallAxes | None
    dtype: jnp.dtype
    merge_rows: bool
    packed: tuple[int, ...] | None
    returns: tuple[int, ...] | None
    precision: str | None

    @classmethod
    def of(cls, layer: RunningLayer, x: jax.Array, options: ExecutionOptions) -> "LayerCall":
        """Of a layer called with `x`.

        Raises:
          ConfigError: by what the layer is said to compute, its kernel takes no such input.
        """
        axes, returns, kernel = None, None, layer.kernel
        placement = kernel.placement
        if layer.contraction is not None:
            axes = layer.contraction.axes(kernel.layout, x.ndim)
            extents = axes.extents(x.shape, kernel.shape)
            if extents is None:
                raise _not_its_input(layer.name, x.shape, kernel, layer.contraction)
            returns = tuple(extents[axis] for axis in axes.out)
            if placement:
                rows = as_rows(x, axes)
                placement = placement.of_rows(rows, len(axes.shared), options.token_axes)
        merge_rows = kernel.placement is None and off_mesh(x)
        dtype = jnp.dtype(layer.dtype)
        where = kernel.layout, placement, axes
        precise = layer.precision
        return cls(layer.run, *where, dtype, merge_rows, kernel.packed, returns, precise)

    def output(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the layer returns.

        Raises:
          ConfigError: it has another shape, so it is not the sum that it is said to be.
        """
        out = self.run(kernel, x, *read)
        if self.returns not in (None, out.shape):
            raise _NotTheSum(
                f"it returned the shape {out.shape}, and x times its kernel has {self.returns} by "
                "what its type is said to compute: state its equation, layer_types={...: "
                "LayerType(layout, Contraction(equation))} or of_einsum(equation, leaf=...), or "
                "call=None where it is no such product"
            )
        return out

    def in_kernel(self, arguments: Arguments, updates: Sequence[Update]) -> jax.Array:
        """The layer once, with W + delta."""
        kernel = Kernel(arguments.kernel, self.layout, self.placement)
        with self.precise():
            whole = kernel.taking(updates, formed_in(self.dtype))
        return self.output(whole, arguments.x, *arguments.read)

    def beside(
        self, arguments: Arguments, updates: Sequence[Update], *, factored: bool
    ) -> jax.Array:
        """The untouched layer, and beside it what each adapter makes of its input."""
        out = self.output(arguments.kernel, arguments.x, *arguments.read)
        sizes = self.layout.out_sizes(self.packed or arguments.kernel.shape)
        seen = [arguments.x if x is None else x for x in arguments.seen]
        with self.precise():
            made = [
                self._through(x.astype(self.dtype), self.answering(out, update), sizes, factored)
                for x, update in zip(seen, updates, strict=True)
            ]
        return self.added(out, made)

    def answering(self, out: jax.Array, update: U) -> U:
        """`update`, whose share comes in float32 if the layer's output is of more bits than x."""
        return replace(update, wide=out.dtype.itemsize > self.dtype.itemsize)

    def precise(self) -> AbstractContextManager[None]:
        """Within, products are as precise as the layer's own."""
        return default_matmul_precision(self.precision) if self.precision else nullcontext()

    def added(self, out: jax.Array, made: Sequence[jax.Array]) -> jax.Array:
        """The layer's output with what adapters make of its input."""
        return summed((out, summed(made))).astype(out.dtype)

    def _through(
        self, x: jax.Array, update: Update, sizes: Sequence[int], factored: bool
    ) -> jax.Array:
        """x through the delta of every matrix, as the output lies; `sizes` of its out axes."""
        assert self.axes is not None
        n_in, n_out = update.matrix

        def one(rows: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
            mine = replace(update, lam=lam, gamma=gamma)
            if self.placement and self.placement.used:
                return self.placement.applied(rows, mine, factored=factored)
            if self.placement:
                mine = self.placement.sliced(mine)
            laid = rows.reshape(-1, n_in) if self.merge_rows else rows
            return mine.applied(laid, factored=factored).reshape(*rows.shape[:-1], n_out)

        every = for_each_matrix(one, self.axes)
        y = every(as_rows(x, self.axes), update.lam, update.gamma)
        return as_output(y, self.axes, sizes)
