"""A wrapped nnx module in a call whose rows have adapters of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.applying_rows import BY_VMAP, SPLIT, adapted_rows
from randlora_jax.core.hoisting import Hoisted
from randlora_jax.core.mesh import splits_rows
from randlora_jax.front_ends.call_input import (
    Arguments,
    CallInput,
    input_of,
    running_layer,
    with_input,
)
from randlora_jax.front_ends.nnx.call import CallContext, reached
from randlora_jax.front_ends.nnx.changes import called
from randlora_jax.front_ends.nnx.held import scale_at
from randlora_jax.front_ends.nnx.leaves import AdapterLeaves
from randlora_jax.front_ends.nnx.running import as_function, with_jax_arrays
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, dotted, slashed
from randlora_jax.models.slots import Chosen, RowChoice, Stack, adapted_or_base


def run_by_row(
    wrapper: AdapterLeaves,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: CallContext,
) -> Any:
    """A method of the wrapped module, each row of its input with its own adapters.

    Raises:
      ConfigError: the module cannot run so.
    """
    base, applied, rows = wrapper.base_layer, wrapper._by_row(), context.by_row
    assert rows is not None
    if not applied:
        return _run_trained_whole(wrapper, method, (args, kwargs), rows)
    reached(wrapper.randlora_settings.model, applied)
    (layer, stacks), *more = applied
    taken = input_of(base.__call__, args, kwargs) if method == "__call__" and not more else None
    if taken is None:
        raise _refusal(wrapper, "it is more than one layer that is called with its input")
    graph, split = nnx.split(base)
    state = with_jax_arrays(dict(nnx.to_flat_state(split)))
    kernel, call = wrapper._running_kernel(layer, state)
    size = taken.x.shape[0] if taken.x.ndim > 1 else 1
    own = _leaves_of_rows(wrapper, rows, size, state)
    if own and splits_rows(taken.x):
        raise _refusal(wrapper, SPLIT)
    if layer.leaf in own:
        return _row_after_row(wrapper, layer, stacks, state, own, taken, context)
    state |= {path: state[path].replace(x) for path, x in own.items()}
    function = as_function(graph, state, layer.leaf, taken, wrapper.randlora_settings.quantiser)
    ids = set(map(id, own.values()))
    held, scale = (kernel, call), scale_at(layer.leaf, state)
    running = running_layer(base, layer.name, held, scale, taken.x, function)
    updates = [
        rows.of_batch(stack.name, size, layer.name)
        .along(taken.x)
        .row_updates(
            *wrapper._stacked(stack, layer, kernel.layout), context.pairs[stack.name], layer.matrix
        )
        for stack in stacks
    ]
    token_axes = wrapper.randlora_settings.options.token_axes
    return adapted_rows(running, taken.x, updates, [id(x) in ids for x in running.read], token_axes)


def _row_after_row(
    wrapper: AdapterLeaves,
    layer: Layer,
    stacks: Sequence[Stack],
    state: Mapping[Path, Any],
    own: Mapping[Path, jax.Array],
    taken: CallInput,
    context: CallContext,
) -> jax.Array:
    """A layer whose kernel one adapter trained whole and another one adapts: each row by itself.

    Args:
      own: leaves that adapters trained whole, (rows, ...), by path.
    """
    assert context.rows is not None
    graph, size = nnx.graphdef(wrapper.base_layer), taken.x.shape[0]
    chosen = {stack: context.rows.of_batch(stack.name, size, layer.name) for stack in stacks}
    held = {stack: wrapper._stacked(stack, layer, layer.layout) for stack in stacks}

    def row(x: jax.Array, own: Mapping[Path, jax.Array], chosen: Sequence[Chosen]) -> jax.Array:
        mine = {**state, **{path: state[path].replace(leaf) for path, leaf in own.items()}}
        kernel = wrapper._running_kernel(layer, mine)
        function = as_function(graph, mine, layer.leaf, taken, wrapper.randlora_settings.quantiser)
        running = running_layer(wrapper.base_layer, layer.name, kernel, None, x, function)
        shares = [
            Contribution(update)
            for stack, one in zip(stacks, chosen, strict=True)
            for update in one.updates(*held[stack], context.pairs[stack.name], layer.matrix)
        ]
        return adapted(running, x[None], shares, wrapper.randlora_settings.options)[0]

    args, kwargs = with_input(taken.rest, taken.place, taken.x)
    every = (taken.x, dict(own), list(chosen.values()))
    made = jax.lax.map(lambda arrays: row(*arrays), every)
    base = wrapper.base_layer(*args, **kwargs)
    return cast(jax.Array, adapted_or_base(chosen.values(), made, base))


def _leaves_of_rows(
    wrapper: AdapterLeaves, rows: RowChoice, size: int, state: Mapping[Path, Any]
) -> dict[Path, jax.Array]:
    """What adapters trained whole here, (rows, ...), by path in the module's `state`."""
    found: dict[Path, jax.Array] = {}
    for path, held in state.items():
        base = held.get_raw_value() if isinstance(held, nnx.Variable) else held
        for stack in wrapper.randlora_settings.stacks:
            leaf = wrapper._stacked_whole(stack, slashed(path), base)
            if leaf is not None:
                chosen = rows.of_batch(stack.name, size, slashed(path))
                found[path] = chosen.leaves(leaf, found.get(path, base))
    return found


def _run_trained_whole(
    wrapper: AdapterLeaves, method: str, arguments: Arguments, rows: RowChoice
) -> Any:
    """A method of a module of which adapters trained leaves whole and no more."""
    if not wrapper._whole_by_row():
        return getattr(wrapper.base_layer, method)(*arguments[0], **arguments[1])
    graph, split = nnx.split(wrapper.base_layer)
    state = with_jax_arrays(dict(nnx.to_flat_state(split)))
    rest, arrays = Hoisted.of(arguments, (jax.Array, np.ndarray))
    if len(arrays) != 1 or not arrays[0].ndim:
        raise _refusal(wrapper, "modules trained whole take one array in such a call")
    x = jnp.asarray(arrays[0])
    own = _leaves_of_rows(wrapper, rows, x.shape[0], state)
    if splits_rows(x):
        raise _refusal(wrapper, SPLIT)

    def row(leaves: tuple[jax.Array, dict[Path, jax.Array]]) -> Any:
        x, mine = leaves
        flat = state | {path: state[path].replace(value) for path, value in mine.items()}
        out, changes = called(graph, flat, method, rest.with_arrays([x[None]]))
        if changes:
            raise _refusal(wrapper, f"it changes its {dotted(changes[0])!r}")
        return jax.tree.map(lambda y: y[0], out)

    # matrices one after another: those of all rows at once would be as large as so many models
    matrices = any(leaf.ndim > 2 for leaf in own.values())
    made = jax.lax.map(row, (x, own)) if matrices else jax.vmap(row)((x, own))
    chosen = [
        rows.of_batch(stack.name, x.shape[0], type(wrapper.base_layer).__name__)
        for stack in wrapper.randlora_settings.stacks
    ]
    base = getattr(wrapper.base_layer, method)(*arguments[0], **arguments[1])
    return adapted_or_base(chosen, made, base)


def _refusal(wrapper: AdapterLeaves, why: str) -> ConfigError:
    """That a module cannot run by row."""
    names = listed([layer.name for layer in wrapper.randlora_settings.layers], 3)
    kind = type(wrapper.base_layer).__name__
    return ConfigError(
        f"{names or kind}: this {kind} cannot run with adapters by row: {why}. {BY_VMAP}"
    )
