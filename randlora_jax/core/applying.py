"""One adapted layer in the middle of its call, whatever framework it lives in.

A front end hands over the untouched layer as a function of its kernel; here it is run with its
adapters' updates, in each pass by the cheapest of the ways that are possible (`ways`, `cost`).

Layers that are alike share one trace: whatever decides how a layer runs is a value (`_Call`), a
static argument of one jitted function, and all arrays are its operands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.typing import DTypeLike

from randlora_jax.core.contraction import CallAxes, Contraction, as_output, as_rows, for_each_matrix
from randlora_jax.core.cost import Plan, Sizes, cheapest, row_order
from randlora_jax.core.hoisting import is_traced
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.mesh import Placement, off_mesh
from randlora_jax.core.passes import each_pass_its_way
from randlora_jax.core.rows import RowOrder, RowUpdates, Trained
from randlora_jax.core.update import Update, formed_in, holds_sums
from randlora_jax.core.ways import ExecutionOptions, Way, possible_ways, require_a_way
from randlora_jax.interop.errors import ConfigError

Run = Callable[..., jax.Array]


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
    """

    name: str
    run: Run
    read: Sequence[jax.Array]
    kernel: Kernel
    contraction: Contraction | None
    dtype: DTypeLike


class Contribution(NamedTuple):
    """One active adapter's share in a call: its update, and its dropout on x if it has one."""

    update: Update
    drop: Callable[[jax.Array], jax.Array] | None = None


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


def dropout(rate: float, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """``torch.nn.Dropout``'s: zero with probability `rate`, else x / (1 - rate)."""

    def drop(x: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))

    return drop


def adapted(
    layer: RunningLayer,
    x: jax.Array,
    contributions: Sequence[Contribution],
    options: ExecutionOptions,
) -> jax.Array:
    """The layer's output for `x` with all `contributions` added.

    Raises:
      ConfigError: the layer cannot run as it is asked to; with all reasons.
    """
    drops = any(share.drop for share in contributions)
    possible = possible_ways(layer.kernel, layer.contraction, layer.dtype, options, drops=drops)
    require_a_way(layer.name, possible)
    updates = [share.update for share in contributions]
    call = _Call.of(layer, x, options)
    sizes = _sizes(layer.kernel, call, x, updates)
    seen = [share.drop(x) if share.drop else None for share in contributions]
    arguments = Arguments(layer.kernel.array, x, seen, layer.read)
    # Outside a trace the operations run one by one, as the model's own do, so that an adapter that
    # adds nothing changes no bit.
    traced = is_traced((arguments, updates))
    run = _run_sharing_traces if traced else _run
    return run(call, cheapest(possible, sizes), arguments, updates)


def adapted_rows(
    layer: RunningLayer,
    x: jax.Array,
    updates: Sequence[RowUpdates],
    by_row: Sequence[bool],
) -> jax.Array:
    """The layer's output where each row of `x`, along its first axis, has adapters of its own.

    A row without any keeps the untouched layer's very bits.

    Args:
      updates: one for each pair of bases.
      by_row: of each array of ``layer.read``, whether it is one for each row.

    Raises:
      ConfigError: the layer cannot run so.
    """
    call = _Call.of(layer, x, ExecutionOptions())
    if call.axes is None and layer.kernel.refusal:
        raise ConfigError(
            f"layer {layer.name!r} cannot run with adapters by row: {layer.kernel.refusal}, and "
            "nothing is known of what it computes: say it with layer_types={...: LayerType(layout, "
            "Contraction(equation))}"
        )
    if call.axes and call.axes.x[0] not in call.axes.rows:
        raise ConfigError(
            f"layer {layer.name!r} cannot run with adapters by row: the first axis of its input "
            f"{x.shape} is not one of rows, but the kernel has it, too. {BY_VMAP}"
        )
    orders = tuple(
        row_order(_row_sizes(call, x, update), x.shape[0], update.lam.shape[-2])
        for update in updates
    )
    arguments = Arguments(layer.kernel.array, x, (), layer.read)
    run = _run_rows_sharing_traces if is_traced((arguments, updates)) else _run_rows
    return run(call, orders, tuple(by_row), arguments, updates)


BY_VMAP = (
    "Any model can run row by row: jax.vmap over rows of a batch of one, each with its own slot"
)


@dataclass(frozen=True)
class _Call:
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
    """

    run: Run
    layout: KernelLayout
    placement: Placement | None
    axes: CallAxes | None
    dtype: jnp.dtype
    merge_rows: bool
    packed: tuple[int, ...] | None

    @classmethod
    def of(cls, layer: RunningLayer, x: jax.Array, options: ExecutionOptions) -> "_Call":
        """Of a layer called with `x`."""
        axes, kernel = None, layer.kernel
        placement = kernel.placement
        if layer.contraction is not None:
            axes = layer.contraction.axes(kernel.layout, x.ndim)
            if placement:
                rows = as_rows(x, axes)
                placement = placement.of_rows(rows, len(axes.shared), options.token_axes)
        merge_rows = kernel.placement is None and off_mesh(x)
        dtype = jnp.dtype(layer.dtype)
        return cls(layer.run, kernel.layout, placement, axes, dtype, merge_rows, kernel.packed)

    def in_kernel(self, arguments: Arguments, updates: Sequence[Update]) -> jax.Array:
        """The layer once, with W + delta."""
        kernel = Kernel(arguments.kernel, self.layout, self.placement)
        whole = kernel.taking(updates, formed_in(self.dtype))
        return self.run(whole, arguments.x, *arguments.read)

    def beside(
        self, arguments: Arguments, updates: Sequence[Update], *, factored: bool
    ) -> jax.Array:
        """The untouched layer, and beside it what each adapter makes of its input."""
        out = self.run(arguments.kernel, arguments.x, *arguments.read)
        sizes = self.layout.out_sizes(self.packed or arguments.kernel.shape)
        seen = [arguments.x if x is None else x for x in arguments.seen]
        made = [
            self._through(x.astype(self.dtype), update, sizes, factored)
            for x, update in zip(seen, updates, strict=True)
        ]
        return (out + sum(made[1:], made[0])).astype(out.dtype)

    def each_row(self, by_row: Sequence[bool], arguments: Arguments) -> jax.Array:
        """The untouched layer, with what it reads of each row's own."""

        def row(x: jax.Array, *read: jax.Array) -> jax.Array:
            return self.run(arguments.kernel, x[None], *read)[0]

        mapped = jax.vmap(row, (0, *(0 if own else None for own in by_row)))
        return mapped(arguments.x, *arguments.read)

    def each_row_in_kernel(
        self, by_row: Sequence[bool], arguments: Arguments, updates: Sequence[RowUpdates]
    ) -> jax.Array:
        """The layer row after row, with W + delta of each: where it is no contraction."""
        own = [x for x, mine in zip(arguments.read, by_row, strict=True) if mine]
        kernel = Kernel(arguments.kernel, self.layout, self.placement)

        def row(arrays: tuple[jax.Array, list[jax.Array], list[list[Trained]]]) -> jax.Array:
            x, own, trained = arrays
            left = iter(own)
            both = zip(arguments.read, by_row, strict=True)
            read = [next(left) if mine else shared for shared, mine in both]
            every = [
                update.alone(*part)
                for update, parts in zip(updates, trained, strict=True)
                for part in parts
            ]
            return self.run(kernel.taking(every), x[None], *read)[0]

        trained = [update.by_row() for update in updates]
        return jax.lax.map(row, (arguments.x, own, trained))

    def rows_through(
        self, x: jax.Array, updates: RowUpdates, sizes: Sequence[int], order: RowOrder
    ) -> jax.Array:
        """x through the delta of every matrix, each row its own, as the output lies."""
        assert self.axes is not None
        n_in, n_out = updates.matrix

        def one(rows: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
            mine = replace(updates, lam=lam, gamma=gamma)
            laid = rows.reshape(rows.shape[0], math.prod(rows.shape[1:-1]), n_in)
            return mine.applied(laid, order).reshape(*rows.shape[:-1], n_out)

        every = for_each_matrix(one, self.axes)
        y = every(as_rows(x, self.axes), updates.lam, updates.gamma)
        return as_output(y, self.axes, sizes)

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


def _run_rows(
    call: _Call,
    orders: Sequence[RowOrder],
    by_row: Sequence[bool],
    arguments: Arguments,
    updates: Sequence[RowUpdates],
) -> jax.Array:
    """The layer's output, each row with its own adapters."""
    untouched = (
        call.each_row(by_row, arguments)
        if any(by_row)
        else call.run(arguments.kernel, arguments.x, *arguments.read)
    )
    if call.axes is None:
        out, batch = call.each_row_in_kernel(by_row, arguments, updates), 0
    else:
        sizes = call.layout.out_sizes(call.packed or arguments.kernel.shape)
        x = arguments.x.astype(call.dtype)
        made = [
            call.rows_through(x, update, sizes, order)
            for update, order in zip(updates, orders, strict=True)
        ]
        out = (untouched + sum(made[1:], made[0])).astype(untouched.dtype)
        batch = call.axes.out.index(call.axes.x[0])
    changed = sum((update.changed() for update in updates[1:]), updates[0].changed())
    changed = jnp.expand_dims(changed, [i for i in range(out.ndim) if i != batch])
    return jnp.where(changed, out, untouched)


_run_rows_sharing_traces = jax.jit(_run_rows, static_argnums=(0, 1, 2))


def _row_sizes(call: _Call, x: jax.Array, update: RowUpdates) -> Sizes:
    """What the cost model counts with, for adapters by row."""
    tokens = x.size // update.matrix[0]
    return Sizes.in_dtype(call.dtype, max(1, tokens), *update.matrix, update.flat_rank)


def _run(call: _Call, plan: Plan, arguments: Arguments, updates: Sequence[Update]) -> jax.Array:
    """The layer's output, each pass its way."""
    if not holds_sums(arguments.kernel.dtype) and is_traced(arguments):
        call = replace(call, run=_read_now(call.run, arguments))
    ways: Mapping[Way, Callable[[Arguments, Sequence[Update]], jax.Array]] = {
        Way.IN_KERNEL: call.in_kernel,
        Way.FORMED: partial(call.beside, factored=False),
        Way.FACTORED: partial(call.beside, factored=True),
    }
    product = each_pass_its_way(ways[plan.forward], ways[plan.inputs], ways[plan.trained])
    return product(arguments, updates)


def _read_now(run: Run, arguments: Arguments) -> Run:
    """The operations of a layer, as they are while its model is called.

    What a quantiser makes of them holds only until then, and gradients are asked for later.
    """
    kernel, x, _, read = arguments
    operations = jaxpr_as_fun(jax.make_jaxpr(run)(kernel, x, *read))
    return lambda *arrays: operations(*arrays)[0]


_run_sharing_traces = jax.jit(_run, static_argnums=(0, 1))


def _sizes(kernel: Kernel, call: _Call, x: jax.Array, updates: Sequence[Update]) -> Sizes:
    """What the cost model counts with: of one device."""
    _, n_in, n_out = kernel.layout.sizes(kernel.shape)
    tokens, shards = x.size // n_in, 1
    if call.axes:
        tokens = math.prod(x.shape[call.axes.x.index(axis)] for axis in call.axes.rows)
    if placement := call.placement:
        tokens //= placement.size(placement.tokens)
        shards = placement.size((*placement.n_in, *placement.n_out))
    rank = sum(update.flat_rank for update in updates)
    return Sizes.in_dtype(call.dtype, max(1, tokens), n_in, n_out, rank, shards)
