"""Many adapters at once: each row of a batch its own; loaded and unloaded without compiling."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from randlora_jax.interop.adapter_name import checked_name
from randlora_jax.interop.errors import ConfigError, listed, shown
from randlora_jax.models import life, stacking
from randlora_jax.models.filled import refuse_abstract
from randlora_jax.models.merging import MergingModel
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.slots import AdapterRows, RowChoice, Slot, SlotTable, as_rows
from randlora_jax.models.store import ArrayStore


class ManyAdapters(MergingModel):
    """A model whose adapters can lie side by side, so that rows of one batch choose from them."""

    def stack_adapters(self, capacity: int | None = None, *, parts: int = 1) -> None:
        """Lays all adapters side by side, each in a slot of its own, with room for more.

        From here on whatever changes is data: `load_adapter`, `delete_adapter`, `hotswap_adapter`,
        `set_adapter`, `set_scale`, `set_rows` and ``adapter_names`` run what was compiled. Adapters
        in stacks are applied and not trained, and have no dropout. Called again, with room for more
        or for others, it makes new stacks, and so a new program.

        Args:
          capacity: for how many adapters of each pair of bases (key, kind, rank) that the model's
            adapters have; by default for those that are here. Memory for all is taken at once.
          parts: how many adapters one slot may combine (`add_weighted_adapter`).

        Raises:
          ConfigError: the model has no adapter, or more than `capacity` of one pair; some are
            merged; several are active together; a combination has no room, or more than `parts`.
        """
        for argument, value in (("capacity", capacity), ("parts", parts)):
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise ConfigError(f"{argument}: expected a positive integer, found {shown(value)}")
        registry, store = self._registry, self._store
        life.refuse_while_merged(registry, "stack_adapters")
        if not registry.specs:
            raise ConfigError(
                "stack_adapters: this model has no adapter yet: add or load one first"
            )
        if len(registry.active) > 1:
            raise ConfigError(
                f"stack_adapters: {listed(registry.active)} are active together, which in stacks "
                "is a combination: set_adapter(one of them) first, add_weighted_adapter() then"
            )
        states = self._numbers(registry.specs)
        base = store.base_leaves()
        refuse_abstract(base.values())
        room = registry.room(capacity)
        after = dataclasses.replace(
            registry, stacks=room, slots={}, parts=int(parts), trained=frozenset()
        )
        numbers = stacking.renumbered(after, room)
        slots = {n: stacking.in_slot(after, n, number, states[n]) for n, number in numbers.items()}
        after = dataclasses.replace(after, slots=slots)
        for name in filter(registry.combination, registry.slots):
            after = stacking.with_combination(after, name, registry.slots[name])
        held = {}
        for stack in room:
            mine = {n: states[n] for n in numbers if registry.specs[n].identity == stack.identity}
            now = stacking.empty(registry, base, stack, list(mine.values()))
            for name, state in mine.items():
                now = stacking.written(now, numbers[name] - stack.first, state)
            held[stack] = now
        for name in [s.name for s in registry.stacks] or list(registry.specs):
            store.remove(name)
        for stack, now in held.items():
            store.install(after, after.spec_of_stack(stack), now, None)
        store.set_slots(None)  # those of now may be another model's, too
        self._follow(after, store)

    def rows(
        self, adapter_names: Sequence[str], scale: Sequence[float] | None = None
    ) -> jax.Array | AdapterRows:
        """The slots of adapters: what ``adapter_names`` takes where names cannot be, under ``jit``.

        They stay what they are while adapters come and go: of one that was deleted they give the
        base model. `stack_adapters` gives new ones.

        Args:
          adapter_names: one for each row of a batch; ``"__base__"`` for none.
          scale: how strong each row's adapter is, 1 by default.

        Raises:
          ConfigError: no such adapter; `scale` is not one number for each; or adapters in stacks
            are named in a function that is being compiled.

        Returns:
          (rows,) int32; with `scale`, `AdapterRows` of that and (rows,) float32.
        """
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            raise ConfigError(
                f"adapter_names: expected one name for each row, found {shown(adapter_names)}"
            )
        registry = self._registry
        slots = np.array([registry.slot_of(name) for name in adapter_names], np.int32)
        table = self._store.slots()
        stacking.refuse_names_in_trace(table)
        stacking.refuse_stale(adapter_names, registry, table)
        if scale is None:
            return jax.device_put(slots)  # told: a server may forbid other transfers
        try:
            with np.errstate(over="ignore"):
                strengths = np.asarray(scale, np.float32)
        except (TypeError, ValueError):
            strengths = np.array(np.nan)
        if strengths.shape != slots.shape or not np.isfinite(strengths).all():
            raise ConfigError(
                f"scale: expected {len(slots)} finite numbers, one for each row, found "
                f"{shown(scale)}"
            )
        return AdapterRows(*jax.device_put((slots, strengths)))

    def set_rows(self, adapter_names: Sequence[str]) -> None:
        """What rows take from here on, in calls that name none.

        For code that calls the model itself, such as a sampler. `set_adapter` gives all rows one
        adapter again.

        Raises:
          ConfigError: no such adapter, none is named, or the adapters are not in stacks.
        """
        self._need_stacks("set_rows")
        if not len(self.rows(adapter_names)):
            raise ConfigError("set_rows: expected a name for each row, found none")
        self._follow(dataclasses.replace(self._registry, chosen=tuple(adapter_names)))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Applies and trains the named adapter or adapters, and no other.

        Args:
          inference_mode: apply without training. In stacks, none trains.

        Raises:
          ConfigError: no such adapter, one of them is merged into the base, two of them trained
            the same module whole, or several are named whose place is in stacks.
        """
        if not self._registry.stacks:
            super().set_adapter(adapter_name, inference_mode)
            return
        life.check_flag("inference_mode", inference_mode)
        one = isinstance(adapter_name, str) or not isinstance(adapter_name, Sequence)
        names: tuple[Any, ...] = (adapter_name,) if one else tuple(adapter_name)
        if len(names) != 1:
            raise ConfigError(
                f"set_adapter: expected one adapter, found {shown(adapter_name)}: in stacks "
                "several together are a combination, add_weighted_adapter(names, weights, name)"
            )
        self._registry.scale(names[0])
        self._follow(dataclasses.replace(self._registry, active=names, chosen=()))

    def hotswap_adapter(self, directory: str | FilePath, adapter_name: str, **options: Any) -> None:
        """Puts the adapter stored in `directory` in place of one that is here, as PEFT's function.

        It is read whole before anything changes. In stacks it takes the very slot, and compiles
        nothing.

        Args:
          options: as for `load_adapter`.

        Raises:
          RandLoraError: as `load_adapter`; or no adapter has this name.
        """
        before = self._registry
        before.spec(adapter_name)
        spare = dataclasses.replace(
            before,
            specs={n: s for n, s in before.specs.items() if n != adapter_name},
            configs={n: c for n, c in before.configs.items() if n != adapter_name},
        )
        if not before.stacks:
            raise ConfigError(
                "hotswap_adapter: the adapters are not in stacks: call stack_adapters() first, or "
                "delete_adapter() and load_adapter()"
            )
        self._registry = spare
        try:
            self.load_adapter(directory, adapter_name, **options)  # type: ignore[attr-defined]
        except BaseException:
            self._registry = before
            raise
        self._follow(dataclasses.replace(self._registry, active=before.active))

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """How strong an adapter is, on top of alpha / r; as PEFT's layers have it. Not saved.

        In stacks this is data; else the model is another program for each scale, which a compiled
        function notices where the model, or `variables` taken since, is its argument.

        Raises:
          ConfigError: no such adapter, or `scale` is no finite number.
        """
        self._follow(life.scaled(self._registry, adapter_name, _finite("scale", scale)))

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strength of the active adapters, as PEFT's layers do.

        Raises:
          ConfigError: `scale` is no finite number.
        """
        by = _finite("scale", scale)
        for name in self._registry.active:
            self.set_scale(name, self._registry.scale(name) * by)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """A linear combination of adapters, under a name of its own: the sum of their deltas.

        RandLoRA's deltas are not closed under sums: no lambda and gamma make this one. So it takes
        a slot that stands for several, exactly, and each row that has it costs as much as all of
        them. For one file there is ``randlora-jax to-lora`` of each, and PEFT's
        ``add_weighted_adapter`` of those.

        Raises:
          ConfigError: they are not in stacks, or not that many fit in a slot; no such adapter; the
            name is taken; the weights are not one finite number for each; an adapter trained
            modules whole, of which there is no sum; another `combination_type` is asked for.
        """
        self._need_stacks("add_weighted_adapter")
        checked_name(adapter_name)
        registry = self._registry
        if combination_type != "linear":
            raise ConfigError(
                f"combination_type={shown(combination_type)}: expected 'linear': PEFT's other "
                "kinds decompose delta_W, which leaves no RandLoRA; `randlora-jax to-lora` makes a "
                "LoRA of each, for PEFT's add_weighted_adapter"
            )
        if adapter_name in registry.specs or adapter_name in registry.slots:
            raise ConfigError(f"an adapter named {adapter_name!r} is already here")
        names = life.named(registry, adapters)
        if not isinstance(weights, Sequence) or not 0 < len(names) == len(weights):
            raise ConfigError(
                f"weights: expected a list, one for each of {len(names)} different adapters, found "
                f"{shown(weights)}"
            )
        values = [_finite("weights", weight) for weight in weights]
        slot = Slot(0, 0, parts=tuple(zip(names, values, strict=True)))
        self._follow(stacking.with_combination(registry, adapter_name, slot))

    # Within.

    def _keep(
        self,
        store: ArrayStore,
        registry: AdapterRegistry,
        spec: AdapterSpec,
        state: AdapterState,
        rngs: Any,
    ) -> AdapterRegistry:
        """In the first free slot of its stack, or in its own where it has one.

        Raises:
          ConfigError: there is no room for it, or it is to be trained.
        """
        if not registry.stacks:
            return super()._keep(store, registry, spec, state, rngs)
        if spec.name in registry.trained:
            raise ConfigError(
                f"adapter {spec.name!r}: adapters in stacks are applied, not trained: load it with "
                "is_trainable=False, or train it in a model without stack_adapters()"
            )
        stack = stacking.stack_of(registry, spec.name)
        held = store.state(stack.name)
        stacking.refuse_stale(registry.slots, registry, store.slots())
        stacking.refuse_misfit(spec.name, held, state, registry)
        number = stacking.own_slot(registry, stack, spec.name)
        now = stacking.written(held, number - stack.first, state)
        store.install(registry, registry.spec_of_stack(stack), now, None)
        slots = {**registry.slots, spec.name: stacking.in_slot(registry, spec.name, number, state)}
        return dataclasses.replace(registry, slots=slots)

    def _need_stacks(self, what: str) -> None:
        if not self._registry.stacks:
            raise ConfigError(
                f"{what}: the adapters are kept one by one: call stack_adapters() first"
            )

    def _chosen(
        self, adapter_names: Any, beams: int = 1, table: SlotTable | None = None
    ) -> RowChoice | None:
        """What a call takes of the stacks; None where it applies the active adapters as they are.

        Args:
          adapter_names: one for each row, or slots; None where the call names none.
          beams: how often a row may stand one after another, in a search.
          table: of the variables that are called with, where these are not the model's own.

        Raises:
          ConfigError: adapters are merged or off, or it is something else.
        """
        registry = self._registry
        if adapter_names is None and not registry.stacks:
            return None
        if adapter_names is not None:
            life.refuse_while_merged(registry, "adapter_names")
            life.refuse_while_off(registry, "adapter_names")
        if isinstance(adapter_names, Iterable) and not isinstance(
            adapter_names, jax.Array | np.ndarray | AdapterRows
        ):
            slots = self.rows(adapter_names)  # type: ignore[arg-type]
            stacking.refuse_names_in_trace(table)
            stacking.refuse_stale(adapter_names, registry, table)
            adapter_names = slots
        store = self._store
        table = table or store.slots() or stacking.table(registry, store.pairs())
        rows = None
        if adapter_names is not None:
            rows = as_rows(adapter_names, registry.slot_count, alike=bool(registry.stacks))
        return RowChoice.of(registry.row_stacks, table, rows, beams)


def _finite(argument: str, value: Any) -> float:
    """A number that a user gave.

    Raises:
      ConfigError: it is none, or not finite.
    """
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{argument}: expected a finite number, found {shown(value)}")
    return float(value)
