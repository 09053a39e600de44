"""The arrays of adapters that lie side by side, and what a table of slots says of them."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.abstract import put
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.mesh import beside
from randlora_jax.core.update import at_least_float32
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.registry import AdapterRegistry, AdapterState
from randlora_jax.models.slots import BASE, Slot, SlotTable, Stack, in_slots
from randlora_jax.models.store import ArrayStore

_WHOLE = (
    "modules trained whole, and biases, are no part of a sum of deltas: combine adapters that have "
    "none"
)
_MORE = "delete_adapter() frees one; stack_adapters(capacity=...) makes more, and a new program"


def states(
    registry: AdapterRegistry, store: ArrayStore, adapter_names: Iterable[str]
) -> dict[str, AdapterState]:
    """The arrays of adapters, wherever they are kept."""
    if not registry.stacks:
        return {name: store.state(name) for name in adapter_names}
    held = {stack.name: store.state(stack.name) for stack in registry.stacks}
    return {
        name: _one(held[stack.name], registry.slots[name], stack)
        for name in adapter_names
        for stack in [stack_of(registry, name)]
    }


def stack_of(registry: AdapterRegistry, adapter_name: str) -> Stack:
    """The stack that has room for an adapter's bases.

    Raises:
      ConfigError: none has.
    """
    identity = registry.specs[adapter_name].identity
    for stack in registry.stacks:
        if stack.identity == identity:
            return stack
    raise ConfigError(
        f"adapter {adapter_name!r} has the bases {identity}, and there are stacks of "
        f"{listed([stack.name for stack in registry.stacks])}: a model that has such an adapter "
        "when stack_adapters() is called has room for others of its bases"
    )


def _one(held: AdapterState, slot: Slot, stack: Stack) -> AdapterState:
    """The adapter in a slot of a stack that holds `held`."""
    i = slot.number - stack.first
    layers = {
        name: (lam[..., i, :, :], gamma[..., i, :, :])
        for name, (lam, gamma) in held.layers.items()
        if name in slot.layers
    }
    return AdapterState(layers, {p: x[i] for p, x in held.saved.items() if p in slot.saved})


def in_slot(registry: AdapterRegistry, name: str, number: int, state: AdapterState) -> Slot:
    """What is to be known of an adapter in a slot."""
    spec, saved = registry.specs[name], sorted(map(dotted, state.saved))
    stamp = _stamp(name, str(spec.identity), spec.scaling, sorted(state.layers), saved)
    return Slot(number, stamp, frozenset(state.layers), frozenset(state.saved))


def _stamp(*settings: Any) -> int:
    """The same in every process: a restored table says what the one said that was saved."""
    return zlib.crc32(repr(settings).encode()) >> 1 | 1


def empty(
    registry: AdapterRegistry, base: Mapping[Path, Any], stack: Stack, like: Sequence[AdapterState]
) -> AdapterState:
    """The arrays of a stack without adapters, on every device, with room for such as `like`.

    Raises:
      ConfigError: what is trained whole lies in a stack of layers.
    """
    layers = {
        name: (_room(lam, stack.capacity), _room(gamma, stack.capacity))
        for state in like
        for name, (lam, gamma) in state.layers.items()
    }
    saved = {path: base[path] for state in like for path in state.saved}
    own = {path: jnp.zeros(stack.capacity, bool) for path in saved}
    for path in saved:
        layer = registry.layer_of(path)
        if layer is not None and layer.stack:
            raise ConfigError(
                f"{dotted(path)!r} is trained whole and belongs to {len(layer.names)} layers that "
                "lie in one array: adapters that train it cannot run by row; open them one by one"
            )
    whole = {
        path: jnp.zeros((stack.capacity, *x.shape), at_least_float32(x.dtype))
        for path, x in saved.items()
    }
    where = registry.replicated(base)
    return AdapterState(*(put(held, where) for held in (layers, whole, own)))


def _room(x: Any, capacity: int) -> jax.Array:
    return jnp.zeros((*x.shape[:-2], capacity, *x.shape[-2:]), jnp.float32)


def written(held: AdapterState, index: int, state: AdapterState) -> AdapterState:
    """What a stack holds once `state` is in place `index` of it.

    Layers that the adapter does not take get lambda zero; leaves that it did not train are none of
    its own.
    """

    def layer(name: str, stacked: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        both = state.layers.get(name) or [jnp.zeros(()) for _ in stacked]
        return tuple(
            _set(x, index, jnp.asarray(new), x.ndim - 3)
            for x, new in zip(stacked, both, strict=True)
        )

    layers = {name: layer(name, stacked) for name, stacked in held.layers.items()}
    saved = {
        path: _set(x, index, jnp.asarray(state.saved.get(path, 0)), 0)
        for path, x in held.saved.items()
    }
    own = {
        path: _set(x, index, jnp.asarray(path in state.saved), 0) for path, x in held.own.items()
    }
    return AdapterState(layers, saved, own)


def side_by_side(
    stack: Stack, states: Mapping[str, AdapterState], base: Mapping[Path, jax.Array]
) -> AdapterState:
    """What a stack holds that is made in a call, of its members."""
    mine = [states[name] for name in stack.members]

    def layer(name: str) -> tuple[jax.Array, jax.Array]:
        held = [state.layers.get(name, (None, None)) for state in mine]
        lam, gamma = (in_slots(arrays) for arrays in zip(*held, strict=True))
        return lam, gamma

    names = dict.fromkeys(name for state in mine for name in state.layers)
    paths = dict.fromkeys(path for state in mine for path in state.saved)
    saved = {path: jnp.stack([s.saved.get(path, base[path]) for s in mine]) for path in paths}
    return AdapterState({name: layer(name) for name in names}, saved)


@partial(jax.jit, static_argnums=3)
def _set(stacked: jax.Array, index: int, new: jax.Array, axis: int) -> jax.Array:
    """`stacked` with `new` in place `index` of an axis; compiled once for every shape."""
    one = jnp.broadcast_to(new.astype(stacked.dtype), np.delete(stacked.shape, axis))
    return jax.lax.dynamic_update_index_in_dim(stacked, one, index, axis)


def refuse_misfit(
    name: str, held: AdapterState, state: AdapterState, registry: AdapterRegistry
) -> None:
    """Nothing, if a stack that holds `held` has room for all that `state` has.

    Raises:
      ConfigError: it has not, or a combination has it, and cannot have all of that.
    """
    users = registry.combining(name)
    if state.saved and users:
        raise ConfigError(f"adapter {name!r} is a part of {listed(users)}: {_WHOLE}")
    more = [n for n in state.layers if n not in held.layers]
    more += [dotted(path) for path in state.saved if path not in held.saved]
    if more:
        raise ConfigError(
            f"adapter {name!r} adapts or trains whole {listed(more, 3)}, which no adapter did when "
            "the stacks were made, so they have no room for it: make them while an adapter like "
            "it is there. (New leaves are a new program.)"
        )


def own_slot(registry: AdapterRegistry, stack: Stack, adapter_name: str) -> int:
    """The slot that an adapter has in its stack, or the first that holds nothing.

    Raises:
      ConfigError: it has one in another stack, or there is none.
    """
    had = registry.slots.get(adapter_name)
    if had is None:
        return free_slot(registry, stack)
    if had.number not in stack.slots:
        raise ConfigError(
            f"what is to take the place of adapter {adapter_name!r} has other bases than that, "
            f"{stack.name}, so it cannot have its slot: delete_adapter() and load_adapter()"
        )
    return had.number


def free_slot(registry: AdapterRegistry, stack: Stack) -> int:
    """The first slot of a stack that holds nothing.

    Raises:
      ConfigError: it is full.
    """
    for number in _free(registry, stack):
        return number
    raise ConfigError(f"all {stack.capacity} slots of the bases {stack.name} are taken: {_MORE}")


def _free(registry: AdapterRegistry, stack: Stack) -> list[int]:
    taken = {slot.number for slot in registry.slots.values()}
    return [number for number in stack.slots if number not in taken]


def table(registry: AdapterRegistry, pairs: Mapping[str, BasisPair]) -> SlotTable:
    """What the slots of a registry stand for, stacks kept or not; where its `pairs` lie."""
    count, width = registry.slot_count, registry.parts
    parts, weights = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
    stamps, scales = np.zeros(count, np.int32), np.ones(count, np.float32)
    places = registry.places
    for name in (*registry.specs, *(n for n, slot in registry.slots.items() if slot.parts)):
        number, slot = registry.slot_of(name), registry.slots.get(name)
        together = slot.parts if slot and slot.parts else ((name, 1.0),)
        for i, (part, weight) in enumerate(together if registry.enabled else ()):
            parts[number, i] = places[part]
            weights[number, i] = weight * registry.specs[part].strength
        if slot and slot.parts:
            weights[number] *= slot.scale
        stamps[number] = slot.stamp if slot else 0
        scales[number] = registry.scale(name)
    chosen = np.array(registry.chosen_slots(), np.int32)
    active = np.array(registry.active_slot, np.int32)
    where = next((beside(pair.A) for pair in pairs.values()), None)
    arrays = jax.device_put((parts, weights, stamps, chosen, active, scales), where)
    return SlotTable(*arrays)


def is_readable(table: SlotTable) -> bool:
    """Whether a table has numbers that can be looked at."""
    return all(
        isinstance(x, np.ndarray)
        or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.is_deleted())
        for x in table
    )


def chosen_in(registry: AdapterRegistry, table: SlotTable) -> AdapterRegistry:
    """A registry with what a table says of choices: which is active, what rows take, strengths.

    Copies of a model share what is known of its adapters, and choose each for itself.
    """
    held = SlotTable(*jax.device_get(tuple(table)))
    names = {0: BASE} | {slot.number: name for name, slot in registry.slots.items()}

    def scale(known: float, slot: Slot) -> float:
        told = held.scales[slot.number]
        return known if np.float32(known) == told else float(told)

    specs, slots = dict(registry.specs), dict(registry.slots)
    for name, slot in registry.slots.items():
        if slot.parts:
            slots[name] = replace(slot, scale=scale(slot.scale, slot))
        elif name in specs:
            specs[name] = replace(specs[name], scale=scale(specs[name].scale, slot))
    active = int(held.active)
    return replace(
        registry,
        active=(names[active],) if active and active in names else (),
        chosen=tuple(names.get(int(slot), BASE) for slot in held.chosen)
        if held.chosen.ndim
        else (),
        enabled=bool(held.parts.any()) if held.stamps.any() else registry.enabled,
        specs=specs,
        slots=slots,
    )


def refuse_stale(
    adapter_names: Iterable[str], registry: AdapterRegistry, table: SlotTable | None
) -> None:
    """Nothing, if a table has what the registry says in the slots of adapters, or is traced.

    Raises:
      ConfigError: it has not: it is of a copy of the model that went another way.
    """
    if table is None or isinstance(table.stamps, jax.core.Tracer):
        return
    stamps = np.asarray(table.stamps)
    for name in dict.fromkeys(adapter_names):
        slot = registry.slots.get(name)
        if slot and stamps[slot.number] != slot.stamp:
            raise ConfigError(
                f"adapter {name!r} is not in slot {slot.number} of this copy of the model, but of "
                "one with which it shares what is known of adapters (nnx.split and nnx.merge make "
                "such copies), or of variables as they were before: go on with that model, or with "
                "model.variables after the last change. stack_adapters() parts a copy from the "
                "model that it was made of, before either changes"
            )


def refuse_lost(registry: AdapterRegistry, table: SlotTable | None) -> None:
    """Nothing, if a registry knows of all that a table has in its slots, or that is traced.

    Raises:
      ConfigError: it does not: another copy of the model deleted it, in its own arrays.
    """
    if table is None or isinstance(table.stamps, jax.core.Tracer):
        return
    known = {slot.number for slot in registry.slots.values()}
    lost = [int(i) for i in np.flatnonzero(np.asarray(table.stamps)) if int(i) not in known]
    if lost:
        raise ConfigError(
            f"slots {lost} of this copy of the model hold adapters that were deleted in another "
            "one, with which it shares what is known of adapters (nnx.clone makes such copies): "
            "what is known here would go as well. Go on with that model, or call stack_adapters(), "
            "which lays out anew what is still known. Called on a copy before either changes, it "
            "parts the two"
        )


def refuse_names_in_trace(table: SlotTable | None) -> None:
    """Nothing, if names can be looked up in a table.

    Raises:
      ConfigError: it is traced: their slots of now would be compiled in.
    """
    if table is not None and isinstance(table.stamps, jax.core.Tracer):
        raise ConfigError(
            "adapter_names: in a function that is compiled, names would stand for the slots they "
            "have now, whatever is loaded later: pass rows = model.rows(names) as an argument"
        )


def renumbered(registry: AdapterRegistry, stacks: tuple[Stack, ...]) -> dict[str, int]:
    """A slot in new stacks for each adapter that there is."""
    numbers: dict[str, int] = {}
    for stack in stacks:
        mine = [name for name, spec in registry.specs.items() if spec.identity == stack.identity]
        numbers |= dict(zip(mine, stack.slots, strict=False))
    return numbers


def with_combination(registry: AdapterRegistry, name: str, slot: Slot) -> AdapterRegistry:
    """With a combination of adapters under a name of its own, in a free slot.

    Args:
      slot: its parts.

    Raises:
      ConfigError: there is no room, or a part trained modules whole.
    """
    if len(slot.parts) > registry.parts:
        raise ConfigError(
            f"{name!r} combines {len(slot.parts)} adapters, and a slot has room for "
            f"{registry.parts}: stack_adapters(parts={len(slot.parts)}) makes more, and a new "
            "program"
        )
    whole = [part for part, _ in slot.parts if registry.slots[part].saved]
    if whole:
        raise ConfigError(f"adapters {listed(whole)}: {_WHOLE}")
    free = [number for stack in registry.stacks for number in _free(registry, stack)]
    if not free:
        raise ConfigError(f"all slots are taken, and {name!r} needs one: {_MORE}")
    mine = replace(slot, number=free[0], stamp=_stamp(name, slot.parts))
    return replace(registry, slots={**registry.slots, name: mine})
