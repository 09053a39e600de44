"""One layer in the middle of a call whose rows have adapters of their own (`rows`)."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from randlora_jax.core.contraction import as_output, as_rows, for_each_matrix
from randlora_jax.core.cost import Sizes, row_order
from randlora_jax.core.hoisting import is_traced
from randlora_jax.core.layer_call import Arguments, LayerCall, Run, RunningLayer, naming
from randlora_jax.core.rows import RowOrder, RowUpdates
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.interop.errors import ConfigError

BY_VMAP = (
    "Any model can run row by row: jax.vmap over rows of a batch of one, each with its own slot"
)

SPLIT = (
    "modules trained whole and biases run one row at a time, which explicit mesh axes that split "
    "the batch do not allow (automatic ones, with token_axes=, do)"
)


def adapted_rows(
    layer: RunningLayer,
    x: jax.Array,
    updates: Sequence[RowUpdates],
    by_row: Sequence[bool],
    token_axes: tuple[str, ...],
) -> jax.Array:
    """The layer's output where each row of `x`, along its first axis, has adapters of its own.

    A row without any keeps the untouched layer's very bits.

    Args:
      updates: one for each pair of bases.
      by_row: of each array of ``layer.read``, whether it is one for each row.
      token_axes: the mesh axes that split a batch, where a trace cannot see it.

    Raises:
      ConfigError: the layer cannot run so.
    """
    call = LayerCall.of(layer, x, ExecutionOptions(token_axes=token_axes))
    if call.axes is None:
        raise ConfigError(
            f"layer {layer.name!r} cannot run with adapters by row: nothing is known of what it "
            "computes, and so of its rows: say it with layer_types={...: LayerType(layout, "
            f"Contraction(equation))}}. {BY_VMAP}"
        )
    if call.axes.x[0] not in call.axes.rows:
        raise ConfigError(
            f"layer {layer.name!r} cannot run with adapters by row: the first axis of its input "
            f"{x.shape} is not one of rows, but the kernel has it, too. {BY_VMAP}"
        )
    orders = tuple(_row_order(call, x, update) for update in updates)
    arguments = Arguments(layer.kernel.array, x, (), layer.read)
    run = _run_rows_sharing_traces if is_traced((arguments, updates)) else _run_rows
    with naming(layer.name):
        return run(call, orders, tuple(by_row), arguments, updates)


def _run_rows(
    call: LayerCall,
    orders: Sequence[RowOrder],
    by_row: Sequence[bool],
    arguments: Arguments,
    updates: Sequence[RowUpdates],
) -> jax.Array:
    """The layer's output, each row with its own adapters."""
    assert call.axes is not None
    own = replace(call, run=_each_row(call.run, by_row)) if any(by_row) else call
    out = own.output(arguments.kernel, arguments.x, *arguments.read)
    sizes = call.layout.out_sizes(call.packed or arguments.kernel.shape)
    x = arguments.x.astype(call.dtype)
    with call.precise():
        made = [
            _through(call, x, call.answering(out, update), sizes, order)
            for update, order in zip(updates, orders, strict=True)
        ]
    changed = sum((update.changed() for update in updates[1:]), updates[0].changed())
    batch = call.axes.out.index(call.axes.x[0])
    changed = jnp.expand_dims(changed, [i for i in range(out.ndim) if i != batch])
    return jnp.where(changed, call.added(out, made), out)


_run_rows_sharing_traces = jax.jit(_run_rows, static_argnums=(0, 1, 2))


def _row_order(call: LayerCall, x: jax.Array, update: RowUpdates) -> RowOrder:
    """The cheapest for the rows of one device."""
    rows, tokens = x.shape[0], x.size // update.matrix[0]
    if placement := call.placement:
        tokens //= placement.size(placement.tokens)
        rows //= placement.size(placement.rows[0]) if placement.rows else 1
    sizes = Sizes.in_dtype(call.dtype, max(1, tokens), *update.matrix, update.flat_rank)
    order = row_order(sizes, max(1, rows), update.lam.shape[-2])
    if call.placement and not call.placement.followed and order is RowOrder.DELTA:
        return RowOrder.FACTORS  # row after row, the partitioner would send each to all devices
    return order


def _each_row(run: Run, by_row: Sequence[bool]) -> Run:
    """The untouched layer, with what it reads of each row's own."""

    def row(kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        return run(kernel, x[None], *read)[0]

    return jax.vmap(row, (None, 0, *(0 if own else None for own in by_row)))


def _through(
    call: LayerCall, x: jax.Array, updates: RowUpdates, sizes: Sequence[int], order: RowOrder
) -> jax.Array:
    """x through the delta of every matrix, each row its own, as the output lies."""
    assert call.axes is not None

    def one(rows: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
        mine = replace(updates, lam=lam, gamma=gamma)
        if call.placement and call.placement.used:
            return call.placement.applied_by_row(rows, mine, order)
        return (call.placement.sliced(mine) if call.placement else mine).applied(rows, order)

    every = for_each_matrix(one, call.axes)
    y = every(as_rows(x, call.axes), updates.lam, updates.gamma)
    return as_output(y, call.axes, sizes)
