"""Adapters side by side: slots, from which the rows of a batch choose. All that changes is data.

Adapters that share a pair of bases lie in one *stack*, an axis of each of their arrays. A slot is a
number: 0 is the base model, and each stack has a range of its own. What a slot stands for is told
by a table of numbers, so that loading, unloading, scaling and combining compiles nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.applying_rows import BY_VMAP
from randlora_jax.core.bases import BasisIdentity, BasisPair, Extents
from randlora_jax.core.mesh import along, picked
from randlora_jax.core.rows import RowUpdates
from randlora_jax.core.update import Update
from randlora_jax.interop.errors import ConfigError, listed, shown
from randlora_jax.models.names import Path

BASE = "__base__"  # PEFT's name for no adapter


@dataclass(frozen=True)
class Stack:
    """Room for adapters that share a pair of bases: static under ``jit``.

    Args:
      identity: of the pair.
      extents: of the pair, for all layers that the stack covers.
      first: the slot of its first adapter.
      capacity: how many it has room for.
      members: the adapters that are kept one by one and stacked in each call; () where the stack
        itself is kept.
    """

    identity: BasisIdentity
    extents: Extents
    first: int
    capacity: int
    members: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """By which its arrays are kept."""
        return str(self.identity)

    @property
    def held(self) -> tuple[str, ...]:
        """The names by which its arrays are kept: its own, or one for each adapter."""
        return self.members or (self.name,)

    @property
    def slots(self) -> range:
        """Its own."""
        return range(self.first, self.first + self.capacity)


def stacked(
    pairs: Mapping[str, tuple[BasisIdentity, Extents]], capacity: int | None = None
) -> tuple[Stack, ...]:
    """A stack for each pair of bases that adapters use, by the adapters' names.

    Args:
      capacity: of each; None for stacks of just these, made anew in each call.

    Raises:
      ConfigError: it is less than there are.
    """
    members: dict[BasisIdentity, list[str]] = {}
    for name, (identity, _) in pairs.items():
        members.setdefault(identity, []).append(name)
    found: list[Stack] = []
    for identity, names in members.items():
        if capacity is not None and capacity < len(names):
            raise ConfigError(
                f"capacity={capacity}: expected room for the {len(names)} adapters of the bases "
                f"{identity}: {listed(names)}"
            )
        extents = Extents(0, 0, 0)
        for name in names:
            extents = extents.union(pairs[name][1])
        first = found[-1].slots.stop if found else 1
        kept = tuple(names) if capacity is None else ()
        found.append(Stack(identity, extents, first, capacity or len(names), kept))
    return tuple(found)


@dataclass(frozen=True)
class Slot:
    """An adapter in a stack that is kept, or a combination of some: what no array tells of it.

    Args:
      number: of the slot.
      stamp: tells what is in it, by name and settings, and so what is there no more.
      layers: names of those that it adapts.
      saved: paths of the leaves that it trained whole.
      parts: slots and weights that it combines; () for an adapter.
      scale: its strength, as set by the user.
    """

    number: int
    stamp: int
    layers: frozenset[str] = frozenset()
    saved: frozenset[Path] = frozenset()
    parts: tuple[tuple[str, float], ...] = ()
    scale: float = 1.0


class SlotTable(NamedTuple):
    """What the slots of a model stand for: arrays, K parts a slot.

    Args:
      parts: (slots, K) int32, slots of adapters; 0 for none.
      weights: (slots, K) float32, alpha / r times their strength.
      stamps: (slots,) int32, of what is in each; 0 for nothing.
      chosen: () or (rows,) int32, the slots of a call that names none.
      active: () int32, the slot of the active adapter; 0 for none.
      scales: (slots,) float32, the strengths that the user set.
    """

    parts: jax.Array
    weights: jax.Array
    stamps: jax.Array
    chosen: jax.Array
    active: jax.Array
    scales: jax.Array


class AdapterRows(NamedTuple):
    """The slot of each row of a batch, and its strength: (rows,) int32 and float32."""

    slots: jax.Array
    scale: jax.Array


class Chosen(NamedTuple):
    """What a call takes of one stack: (K,) for all rows alike, or (rows, K).

    Args:
      place: in the stack, int32; anything where it is not `present`.
      weight: float32, zero where it is not present.
      present: bool, there is an adapter of this stack.
    """

    place: jax.Array
    weight: jax.Array
    present: jax.Array

    @classmethod
    def of(cls, stack: Stack, table: SlotTable, rows: AdapterRows) -> "Chosen":
        """By the slots of `rows`. A slot that does not exist makes numbers that are none."""
        slots = jnp.where(rows.slots < 0, table.parts.shape[0], rows.slots)
        parts = picked(table.parts, slots, 0, mode="fill", fill_value=0)
        weights = picked(table.weights, slots, 0, mode="fill", fill_value=jnp.nan)
        place = parts - stack.first
        present = (place >= 0) & (place < stack.capacity)
        scaled = weights * rows.scale[..., None]
        unknown = jnp.isnan(weights)
        return cls(
            jnp.clip(place, 0, stack.capacity - 1),
            jnp.where(present | unknown, scaled, 0.0),
            present,
        )

    def repeated(self, times: int) -> "Chosen":
        """For a batch that has each row `times`, one after another."""
        return Chosen(*(jnp.repeat(x, times, axis=0) for x in self)) if times > 1 else self

    def along(self, x: jax.Array) -> "Chosen":
        """For rows that are split over devices as the first axis of `x` is."""
        return Chosen(*(along(mine, x) for mine in self))

    def row_updates(
        self, lam: jax.Array, gamma: jax.Array, pair: BasisPair, matrix: tuple[int, int]
    ) -> RowUpdates:
        """What rows get in a layer whose stack has `lam` (*stack, capacity, r, n)."""
        lam, gamma = self._taken(lam), self._taken(gamma)
        return RowUpdates(lam * self.weight[..., None, None], gamma, pair, matrix)

    def updates(
        self, lam: jax.Array, gamma: jax.Array, pair: BasisPair, matrix: tuple[int, int]
    ) -> list[Update]:
        """What all rows get alike."""
        lam, gamma, axis = self._taken(lam), self._taken(gamma), lam.ndim - 3
        return [
            Update(
                jnp.take(lam, i, axis) * self.weight[i], jnp.take(gamma, i, axis), pair, 1.0, matrix
            )
            for i in range(self.weight.shape[0])
        ]

    def _taken(self, stacked: jax.Array) -> jax.Array:
        return picked(stacked, self.place, stacked.ndim - 3, mode="clip")

    def leaves(self, stacked: jax.Array, base: jax.Array) -> jax.Array:
        """(rows, ...): of a leaf trained whole, each row's own; the base model's where none is.

        Args:
          stacked: (capacity, ...).
        """
        place, present = self.place[..., 0], self.present[..., 0]
        own = picked(stacked, place, 0).astype(base.dtype)
        present = jnp.expand_dims(present, range(present.ndim, own.ndim))
        return jnp.where(present, own, base)


@dataclass(frozen=True)
class RowChoice:
    """What one call of a model takes of its stacks.

    Args:
      chosen: by the name of the stack.
      rows: how many rows the batch has; None where all are alike.
      beams: how often a row may stand one after another, in a search.
    """

    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    rows: int | None = None
    beams: int = 1

    @property
    def alike(self) -> bool:
        """Whether all rows have the same adapters."""
        return self.rows is None

    @classmethod
    def of(
        cls, stacks: Sequence[Stack], table: SlotTable, rows: Any = None, beams: int = 1
    ) -> "RowChoice":
        """Of the slots in `rows`, an array or `AdapterRows`; by default those of the table."""
        if rows is None:
            rows = table.chosen
        if not isinstance(rows, AdapterRows):
            rows = AdapterRows(rows, jnp.ones(rows.shape, jnp.float32))
        count = rows.slots.shape[0] if rows.slots.ndim else None
        return cls({s.name: Chosen.of(s, table, rows) for s in stacks}, count, beams)

    def of_batch(self, stack: str, size: int, layer: str) -> Chosen:
        """What a layer takes whose input has `size` rows.

        Raises:
          ConfigError: these are not the batch's.
        """
        assert self.rows is not None
        for times in {1, self.beams}:
            if size == self.rows * times:
                return self.chosen[stack].repeated(times)
        raise ConfigError(
            f"layer {layer!r} was called with {size} rows along the first axis of its input, and "
            f"adapter_names (or set_rows) has {self.rows}: expected one name for each row of the "
            f"batch, and the batch first in every layer. {BY_VMAP}"
        )

    def of_batches(self, size: int, layer: str) -> dict[str, Chosen]:
        """Of every stack, what a layer takes whose input has `size` rows.

        Raises:
          ConfigError: these are not the batch's.
        """
        return {name: self.of_batch(name, size, layer) for name in self.chosen}


def adapted_or_base(chosen: Iterable[Chosen], own: Any, base: Any) -> Any:
    """Rows of `own` where a row has an adapter at all, else of `base`: that keeps its very bits.

    Args:
      chosen: of each stack that counts.
      own, base: trees of (rows, ...).
    """
    present = jnp.stack([each.present.any(-1) for each in chosen]).any(0)

    def either(own: jax.Array, base: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(present, range(1, own.ndim)), own, base)

    return jax.tree.map(either, own, base)


def own_or_base(stacked: jax.Array, own: jax.Array, base: Any) -> jax.Array:
    """(slots, ...) of a leaf trained whole; the base model's, as it is now, of those that did not.

    Args:
      own: (slots,) bool, which adapters trained it.
    """
    mine = jnp.expand_dims(own, range(1, stacked.ndim))
    return jnp.where(mine, stacked, jnp.asarray(base, stacked.dtype))


def in_slots(arrays: Sequence[jax.Array | None]) -> jax.Array:
    """(*stack axes, slots, a, b) of one (*stack axes, a, b) a slot; zeros where there is none."""
    like = next(x for x in arrays if x is not None)
    held = [jnp.zeros_like(like) if x is None else x for x in arrays]
    return jnp.stack(held, like.ndim - 2)


def slots_in_rows(stacked: jax.Array) -> jax.Array:
    """(*stack axes, slots, a, b) as (*stack axes, slots * a, b), which scans take as one's own."""
    *outer, slots, a, b = stacked.shape
    return stacked.reshape(*outer, slots * a, b)


def slots_apart(laid: jax.Array, slots: int) -> jax.Array:
    """(*stack axes, slots, a, b) of what is laid as (*stack axes, slots * a, b)."""
    *outer, rows, b = laid.shape
    return laid.reshape(*outer, slots, rows // slots, b)


def as_rows(rows: Any, slots: int, *, alike: bool) -> jax.Array | AdapterRows:
    """What a user gave in place of names: slots, or `AdapterRows`.

    Args:
      slots: how many there are, the base's among them.
      alike: whether it may be one slot, for all rows.

    Raises:
      ConfigError: it is something else, or (where it can be seen) no slot.
    """
    given = rows.slots if isinstance(rows, AdapterRows) else rows
    kinds = jax.Array | np.ndarray
    if (
        not isinstance(given, kinds)
        or given.ndim > 1
        or (given.ndim == 0 and not alike)
        or not jnp.issubdtype(given.dtype, jnp.integer)
    ):
        raise ConfigError(
            "adapter_names: expected one name for each row, or model.rows(names), an integer array "
            f"(rows,) of slots, found {shown(given)}. (One slot for all rows, (), as under "
            "jax.vmap, needs stack_adapters().)"
        )
    if isinstance(rows, AdapterRows) and not _is_strength(rows.scale, given.shape):
        raise ConfigError(
            f"adapter_names: expected {given.shape} finite numbers as the scale of AdapterRows, "
            f"found {shown(rows.scale)}"
        )
    if not isinstance(given, jax.core.Tracer):
        wrong = [int(slot) for slot in np.ravel(np.asarray(given)) if not 0 <= slot < slots]
        if wrong:
            raise ConfigError(f"adapter_names: expected slots from 0 to {slots - 1}, found {wrong}")
    return (
        AdapterRows(jnp.asarray(given, jnp.int32), rows.scale)
        if isinstance(rows, AdapterRows)
        else jnp.asarray(given, jnp.int32)
    )


def _is_strength(scale: Any, shape: tuple[int, ...]) -> bool:
    """Whether `scale` is an array of that shape, of numbers that are finite where they are seen."""
    kinds = jax.Array | np.ndarray
    if not isinstance(scale, kinds) or scale.shape != shape:
        return False
    real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
    return bool(real and (isinstance(scale, jax.core.Tracer) or jnp.isfinite(scale).all()))
