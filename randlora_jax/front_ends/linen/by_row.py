"""Linen modules in a call whose rows have adapters of their own.

Of what adapters trained whole, a row's own leaves lie beside the module's (`beside`), since flax
checks the shapes of params. An adapted layer reads them by row; a module that has only such leaves
runs row after row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.applying_rows import BY_VMAP, SPLIT
from randlora_jax.core.hoisting import Hoisted
from randlora_jax.core.mesh import splits_rows
from randlora_jax.front_ends.call_input import Arguments
from randlora_jax.front_ends.linen.alone import method_at, rngs_of
from randlora_jax.front_ends.linen.beside import BESIDE, SHARES, TOLD, WHOLE
from randlora_jax.front_ends.params import flat, unboxed, with_leaves
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.names import Path, dotted, slashed
from randlora_jax.models.slots import Chosen, RowChoice, adapted_or_base

Params = Mapping[str, Any]


def trained_whole(params: Params, chosen: Mapping[str, Chosen]) -> dict[Path, jax.Array]:
    """What adapters trained whole of one module, by path in its `params`, as `chosen`.

    Args:
      chosen: by stack: of one adapter, or (rows, ...) of as many.

    Raises:
      ConfigError: a leaf is a part of an array that a scan takes apart, which nothing foretold.
    """
    beside = params.get(BESIDE, {})
    found: dict[Path, jax.Array] = {}
    if WHOLE not in beside:
        return found
    held = flat({key: value for key, value in params.items() if key != BESIDE})
    for path, name_there, shape in beside[TOLD].whole:
        leaf = unboxed(held[path])
        for name, slots in beside[WHOLE][slashed(path)].items():
            foretold = isinstance(slots, list)
            if not foretold and unboxed(held[path]).shape != shape:
                raise ConfigError(
                    f"{name_there!r} of shape {shape} is trained whole, and a scan or vmap takes "
                    f"it apart: adapters that train it cannot run by row. {BY_VMAP}"
                )
            leaf = chosen[name].leaves(jnp.stack(slots) if foretold else slots, leaf)
        found[path] = leaf
    return found


def trained_whole_at(params: Params) -> set[Path]:
    """The leaves of a module, by path in its `params`, of which rows have their own."""
    beside = params.get(BESIDE)
    return {path for path, _, _ in beside[TOLD].whole} if beside else set()


def has_trained_whole(params: Params, *, deep: bool) -> bool:
    """Whether rows have leaves of their own in the params of a module.

    Args:
      deep: or of a module inside it.
    """
    if trained_whole_at(params):
        return True
    inner = [x for key, x in params.items() if key != BESIDE and isinstance(x, Mapping)]
    return deep and any(has_trained_whole(x, deep=True) for x in inner)


def with_trained_whole(params: Params, chosen: Mapping[str, Chosen] | None) -> dict[str, Any]:
    """`params` with what one adapter trained whole in its place, in modules inside, too.

    Args:
      chosen: by stack; None for the base model's own.
    """
    found: dict[str, Any] = {
        key: with_trained_whole(value, chosen)
        if isinstance(value, Mapping) and key != BESIDE
        else value
        for key, value in params.items()
    }
    beside = found.pop(BESIDE, None)
    found = with_leaves(found, trained_whole(params, chosen) if chosen else {})
    if beside and beside[SHARES]:
        found[BESIDE] = {SHARES: beside[SHARES], TOLD: replace(beside[TOLD], whole=())}
    return found


def run_trained_whole(
    module: nn.Module,
    method: str,
    arguments: Arguments,
    choice: RowChoice,
    choosing: Callable[[RowChoice], AbstractContextManager[None]],
) -> Any:
    """A method of a module of which adapters trained leaves whole, each row with its own.

    Rows whose adapters lie in stacks that trained none get what the module makes without.

    Args:
      choosing: within it, the module's adapted layers, itself or inside, take another choice.

    Raises:
      ConfigError: the module cannot run so.
    """
    rest, arrays = Hoisted.of(arguments, (jax.Array, np.ndarray))
    if len(arrays) != 1 or not arrays[0].ndim:
        raise refusal(module, f"it is called with {len(arrays)} arrays, expected its input alone")
    x = jnp.asarray(arrays[0])
    if splits_rows(x):
        raise refusal(module, SPLIT)
    params = module.variables["params"]
    laid = list(_laid(params))
    chosen = choice.of_batches(x.shape[0], _place(module))
    others = {name: held for name, held in module.variables.items() if name != "params"}
    rngs, mutable = rngs_of(module), module.scope.mutable or []
    bare = module.clone(parent=None)
    here = method_at(module.path, method, parent=module.parent)

    def run(x: jax.Array, mine: Mapping[str, Chosen] | None) -> Any:
        variables = {**others, "params": with_trained_whole(params, mine)}
        args, kwargs = rest.with_arrays([x])
        out, after = bare.apply(variables, *args, rngs=rngs, method=here, mutable=mutable, **kwargs)
        _refuse_changes(module, variables, after)
        return out

    def row(given: tuple[jax.Array, dict[str, Chosen]]) -> Any:
        x, mine = given
        with choosing(RowChoice(mine)):
            return jax.tree.map(lambda y: y[0], run(x[None], mine))

    # matrices one after another: those of all rows at once would be as large as so many models
    matrices = any(axes > 1 for _, axes in laid)
    every = (x, chosen)
    own = jax.lax.map(row, every) if matrices else jax.vmap(row)(every)
    names = dict.fromkeys(name for name, _ in laid)
    return adapted_or_base([chosen[name] for name in names], own, run(x, None))


def _laid(params: Params) -> Iterator[tuple[str, int]]:
    """Of all that is trained whole in a module and inside it: the stack, how many axes it has."""
    for key, value in params.items():
        if key == BESIDE:
            for by_stack in value.get(WHOLE, {}).values():
                for name, slots in by_stack.items():
                    yield name, slots[0].ndim if isinstance(slots, list) else slots.ndim - 1
        elif isinstance(value, Mapping):
            yield from _laid(value)


def _refuse_changes(module: nn.Module, before: Params, after: Params) -> None:
    """Nothing, if a module has left its collections as they were.

    Raises:
      ConfigError: it has not.
    """
    was = flat(before)
    for path, leaf in flat(after).items():
        if leaf is not was.get(path):
            raise refusal(module, f"it changes its {dotted(path)!r}")


def refusal(module: nn.Module, why: str) -> ConfigError:
    """That a module cannot run by row."""
    return ConfigError(
        f"{_place(module)}: this {type(module).__name__} cannot run with adapters by row: {why}. "
        f"{BY_VMAP}"
    )


def _place(module: nn.Module) -> str:
    return slashed(module.path) or type(module).__name__
