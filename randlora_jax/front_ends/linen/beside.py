"""What lies beside the kernels in ``params`` while a linen module runs with its adapters.

There, and only there, ``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and carry lambda and gamma as
they do the kernels they belong to, and ``nn.jit`` sees that a call is another one.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
from flax.core import unfreeze

from randlora_jax.front_ends.call_token import CallToken
from randlora_jax.front_ends.collections import adapter_trees, base_collections, state_of
from randlora_jax.front_ends.params import flat, place_beside, unboxed, with_entries, with_leaves
from randlora_jax.models import adapter_arrays, stacking
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.registry import AdapterState
from randlora_jax.models.slots import RowChoice, Stack, own_or_base, slots_in_rows

BESIDE = "randlora"  # its name among the params of a module

SHARES, TOLD = "shares", "told"  # the parts of what lies there
WHOLE = "whole"  # one more, where rows of the batch choose

Shares = Mapping[str, tuple[jax.Array, jax.Array]]  # lambda and gamma by adapter, or by stack


@jax.tree_util.register_static
@dataclass(frozen=True)
class Told:
    """What no array tells of what lies beside the kernels of one module.

    Args:
      leaves: the names of the layers, and where the kernel of each is from here.
      token: of the call.
      whole: where leaves are that rows have of their own, the name and shape of each in the model.
    """

    leaves: tuple[tuple[str, Path], ...]
    token: CallToken
    whole: tuple[tuple[Path, str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Rows:
    """Where all adapters lie in stacks for a call.

    Args:
      stacks: in which.
      choice: what the call takes of them.
    """

    stacks: Sequence[Stack]
    choice: RowChoice


def laid_beside(
    variables: Mapping[str, Any],
    layers: Mapping[str, Layer],
    token: CallToken,
    *,
    applied: bool,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """The collections of the base model, with adapter leaves beside the kernels they adapt.

    Args:
      applied: False leaves the adapters out.
      rows: stacks of adapters in place of those that are applied.
    """
    params = unfreeze(variables["params"])
    base = {path: unboxed(leaf) for path, leaf in flat(params).items()}
    laid: dict[Path, dict[str, dict[str, tuple[jax.Array, jax.Array]]]] = {}
    leaves: dict[str, Path] = {}
    trees = adapter_trees(variables) if applied else {}
    states = {name: state_of(tree) for name, tree in trees.items()}
    if rows:
        states = _in_stacks(rows.stacks, states, base)
    for adapter_name, state in states.items():
        for name, arrays in state.layers.items():
            layer = layers[name]
            place = place_beside(params, layer.kernel_path, len(layer.owner))
            leaves[name] = layer.kernel_path[len(place) :]
            held = map(slots_in_rows, arrays) if rows else arrays
            lam, gamma = map(layer.layout.along_stack, held)
            laid.setdefault(place, {}).setdefault(name, {})[adapter_name] = (lam, gamma)
    entries = {}
    for place, shares in laid.items():
        told = Told(tuple((name, leaves[name]) for name in sorted(shares)), token)
        entries[(*place, BESIDE)] = {SHARES: shares, TOLD: told}
    if rows is None:
        trained = adapter_arrays.trained_whole(states)
        saved = {path: x.astype(base[path].dtype) for path, x in trained.items()}
    elif rows.choice.alike:
        saved = _whole_for_all(states, rows.choice, base)
    else:
        saved = {}
        _lay_whole(entries, params, base, states, layers, token)
    whole = with_entries(with_leaves(params, saved), entries)
    return {**base_collections(variables), "params": whole}


def _in_stacks(
    stacks: Sequence[Stack], states: Mapping[str, AdapterState], base: Mapping[Path, jax.Array]
) -> dict[str, AdapterState]:
    """What each stack holds, kept or made in this call."""
    return {
        stack.name: stacking.side_by_side(stack, states, base)
        if stack.members
        else _with_base(states[stack.name], base)
        for stack in stacks
    }


def _with_base(held: AdapterState, base: Mapping[Path, jax.Array]) -> AdapterState:
    """A stack with the base model's leaves, as they are now, where adapters trained none."""
    saved = {path: own_or_base(x, held.own[path], base[path]) for path, x in held.saved.items()}
    return replace(held, saved=saved)


def _whole_for_all(
    states: Mapping[str, AdapterState], choice: RowChoice, base: Mapping[Path, jax.Array]
) -> dict[Path, jax.Array]:
    """What the one adapter that all rows take trained whole."""
    found: dict[Path, jax.Array] = {}
    for name, state in states.items():
        for path, stacked in state.saved.items():
            found[path] = choice.chosen[name].leaves(stacked, found.get(path, base[path]))
    return found


def _lay_whole(
    entries: dict[Path, Any],
    params: Mapping[str, Any],
    base: Mapping[Path, jax.Array],
    states: Mapping[str, AdapterState],
    layers: Mapping[str, Layer],
    token: CallToken,
) -> None:
    """Adds to `entries` what adapters trained whole, of which each row takes its own.

    A leaf of a module that may be scanned lies there as one array for each slot, which a scan along
    whatever axis slices as it does the leaf.
    """
    scanned = {layer.kernel_path[0] for layer in layers.values() if layer.stack}
    for name, state in states.items():
        for path, stacked in state.saved.items():
            place = place_beside(params, path, len(path) - 1)
            entry = entries.setdefault((*place, BESIDE), {SHARES: {}, TOLD: Told((), token)})
            leaf = path[len(place) :]
            slots = [*stacked] if path[0] in scanned else stacked
            by_stack = entry.setdefault(WHOLE, {}).setdefault(slashed(leaf), {})
            if not by_stack:
                told, mine = entry[TOLD], (leaf, slashed(path), base[path].shape)
                entry[TOLD] = replace(told, whole=(*told.whole, mine))
            by_stack[name] = slots


def layers_in(params: Mapping[str, Any], *, deep: bool) -> Iterator[tuple[str, Path]]:
    """The layers with something beside their kernels, in the params of a module; the kernel's path.

    Args:
      deep: look further in, too.
    """
    for key, value in params.items():
        if key == BESIDE:
            yield from value[TOLD].leaves
        elif deep and isinstance(value, Mapping):
            for name, path in layers_in(value, deep=True):
                yield name, (key, *path)


class Join(Protocol):
    """Makes what takes the place of a layer's kernel."""

    def __call__(self, name: str, kernel: jax.Array, beside: Shares) -> jax.Array:
        """Args: `beside`: what adapters laid beside it."""


def joined(params: Mapping[str, Any], names: Collection[str], join: Join) -> dict[str, Any]:
    """`params` with the kernels of the layers of `names` joined with what lies beside them."""
    found: dict[str, Any] = {
        key: joined(value, names, join) if isinstance(value, Mapping) and key != BESIDE else value
        for key, value in params.items()
    }
    if BESIDE not in found:
        return found
    beside = found.pop(BESIDE)
    shares, told = beside[SHARES], beside[TOLD]
    left = tuple((name, leaf) for name, leaf in told.leaves if name not in names)
    held = flat(found)
    kernels = {
        leaf: join(name, unboxed(held[leaf]), shares[name])
        for name, leaf in told.leaves
        if name in names
    }
    if left:
        rest = {name: shares[name] for name, _ in left}
        found[BESIDE] = {SHARES: rest, TOLD: replace(told, leaves=left)}
    return with_leaves(found, kernels) if kernels else found


def without(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with nothing beside the kernels."""
    return {
        key: without(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
        if key != BESIDE
    }


def cleared(result: Any, mutable: Any, variables: Mapping[str, Any]) -> Any:
    """What ``Module.apply`` gave back, with nothing of adapters among the params in its updates.

    Args:
      mutable: as it was given to ``apply``.
      variables: of the call: what adapters in them train whole is the base model's in the updates.
    """
    if mutable is False or "params" not in result[-1]:
        return result
    output, updates = result
    base = flat(variables["params"])
    saved = {path for tree in adapter_trees(variables).values() for path in state_of(tree).saved}
    params = with_leaves(without(updates["params"]), {path: unboxed(base[path]) for path in saved})
    return output, {**updates, "params": params}
