"""One adapted layer in the middle of its call, whatever framework it lives in.

A front end hands over the untouched layer as a function of its kernel; here it is run with its
adapters' updates, in each pass by the cheapest of the ways that are possible (`ways`, `cost`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax.core.contraction import CallAxes, Contraction, as_output, as_rows, for_each_matrix
from randlora_jax.core.cost import Sizes, cheapest
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.mesh import off_mesh
from randlora_jax.core.passes import each_pass_its_way
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions, Way, possible_ways, require_a_way

Run = Callable[..., jax.Array]


@dataclass(frozen=True)
class RunningLayer:
    """An untouched layer that is being called.

    Args:
      name: for messages.
      run: (kernel, x) -> its output, bias and dtype rules included.
      kernel: as it holds it.
      contraction: what it computes, as a sum over axes of x; None where it is anything else.
      dtype: what it multiplies in.
    """

    name: str
    run: Run
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
    beside = Beside.of(layer, x, options) if layer.contraction else None
    kernel = beside.kernel if beside else layer.kernel
    plan = cheapest(possible, _sizes(kernel, x, beside, updates))
    run, read = jax.closure_convert(layer.run, kernel.array, x)
    ways: Mapping[Way, Callable[[Arguments, Sequence[Update]], jax.Array]] = {
        Way.IN_KERNEL: partial(_in_kernel, run, kernel),
        Way.FORMED: partial(_beside, run, beside, False),
        Way.FACTORED: partial(_beside, run, beside, True),
    }
    product = each_pass_its_way(ways[plan.forward], ways[plan.inputs], ways[plan.trained])
    seen = [share.drop(x) if share.drop else None for share in contributions]
    return product(Arguments(kernel.array, x, seen, read), updates)


@dataclass(frozen=True)
class Beside:
    """How x @ delta is laid out to be added to a layer's output.

    Args:
      kernel: of the layer, placed with the rows of this call.
      axes: of this call.
      tokens: rows of the input, on all devices.
      merge_rows: multiply with the axes of rows merged to one. XLA's CPU compiler sums over one of
        them as it lies, but first transposes a copy to sum over several, as the gradient of delta
        does. On a mesh such axes may be cut, and cannot be merged in place.
    """

    kernel: Kernel
    axes: CallAxes
    tokens: int
    merge_rows: bool

    @classmethod
    def of(cls, layer: RunningLayer, x: jax.Array, options: ExecutionOptions) -> "Beside":
        """Of one call of `layer`, which is a contraction."""
        assert layer.contraction is not None
        axes = layer.contraction.axes(layer.kernel.layout, x.ndim)
        tokens = math.prod(x.shape[axes.x.index(axis)] for axis in axes.rows)
        kernel, placement = layer.kernel, layer.kernel.placement
        if placement:
            rows = placement.of_rows(as_rows(x, axes), len(axes.shared), options.token_axes)
            kernel = replace(kernel, placement=rows)
        return cls(kernel, axes, tokens, not kernel.on_mesh and off_mesh(x))

    def through(self, x: jax.Array, update: Update, *, factored: bool) -> jax.Array:
        """x through the delta of every matrix of the kernel, as the output lies; float32."""
        n_in, n_out = update.matrix
        placement = self.kernel.placement

        def one(rows: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
            mine = replace(update, lam=lam, gamma=gamma)
            if placement and placement.used:
                return placement.applied(rows, mine, factored=factored)
            laid = rows.reshape(-1, n_in) if self.merge_rows else rows
            return mine.applied(laid, factored=factored).reshape(*rows.shape[:-1], n_out)

        every = for_each_matrix(one, self.axes)
        y = every(as_rows(x, self.axes), update.lam, update.gamma)
        return as_output(y, self.axes, self.kernel.layout.out_sizes(self.kernel.array.shape))


def _sizes(kernel: Kernel, x: jax.Array, beside: Beside | None, updates: Sequence[Update]) -> Sizes:
    """What the cost model counts with: of one device."""
    _, n_in, n_out = kernel.layout.sizes(kernel.array.shape)
    tokens, shards = beside.tokens if beside else x.size // n_in, 1
    if placement := kernel.placement:
        tokens //= placement.size(placement.tokens)
        shards = placement.size((*placement.n_in, *placement.n_out))
    rank = sum(update.flat_rank for update in updates)
    return Sizes(max(1, tokens), n_in, n_out, rank, shards)


def _in_kernel(
    run: Run, kernel: Kernel, arguments: Arguments, updates: Sequence[Update]
) -> jax.Array:
    """The layer once, with W + delta."""
    whole = replace(kernel, array=arguments.kernel).taking(updates)
    return run(whole, arguments.x, *arguments.read)


def _beside(
    run: Run,
    beside: Beside,
    factored: bool,
    arguments: Arguments,
    updates: Sequence[Update],
) -> jax.Array:
    """The untouched layer, and what each adapter makes of its input added in float32."""
    out = run(arguments.kernel, arguments.x, *arguments.read)
    total = out.astype(jnp.float32)
    for update, dropped in zip(updates, arguments.seen, strict=True):
        x = arguments.x if dropped is None else dropped
        total = total + beside.through(x, update, factored=factored)
    return total.astype(out.dtype)
