"""One adapted layer in the middle of its call, whatever framework it lives in.

A front end hands over the untouched layer as a function of its kernel; here it is run with its
adapters' updates, in each pass by the cheapest of the ways that are possible (`ways`, `cost`).

Layers that are alike share one trace: whatever decides how a layer runs is a value (`LayerCall`), a
static argument of one jitted function, and all arrays are its operands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from randlora_jax.core.cost import Plan, Sizes, cheapest
from randlora_jax.core.hoisting import is_traced
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.layer_call import Arguments, LayerCall, Run, RunningLayer, naming
from randlora_jax.core.passes import each_pass_its_way
from randlora_jax.core.update import Update, holds_sums
from randlora_jax.core.ways import ExecutionOptions, Way, possible_ways, require_a_way


class Contribution(NamedTuple):
    """One active adapter's share in a call: its update, and its dropout on x if it has one."""

    update: Update
    drop: Callable[[jax.Array], jax.Array] | None = None


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
    call = LayerCall.of(layer, x, options)
    sizes = _sizes(layer.kernel, call, x, updates)
    floats = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(layer.dtype)
    seen = [share.drop(floats) if share.drop else None for share in contributions]
    arguments = Arguments(layer.kernel.array, x, seen, layer.read)
    # Outside a trace the operations run one by one, as the model's own do, so that an adapter that
    # adds nothing changes no bit.
    traced = is_traced((arguments, updates))
    run = _run_sharing_traces if traced else _run
    with naming(layer.name):
        return run(call, cheapest(possible, sizes), arguments, updates)


def _run(call: LayerCall, plan: Plan, arguments: Arguments, updates: Sequence[Update]) -> jax.Array:
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


def _sizes(kernel: Kernel, call: LayerCall, x: jax.Array, updates: Sequence[Update]) -> Sizes:
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
