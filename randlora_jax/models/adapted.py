"""The life of a wrapped model's adapters: PEFT's methods, over a registry and a store of arrays."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.bases import BasisPair
from randlora_jax.interop.adapter_name import checked_name
from randlora_jax.interop.config import ALL_LINEAR, RandLoraConfig, expected_config
from randlora_jax.interop.errors import ConfigError, TargetError, warn
from randlora_jax.models import (
    adapter_arrays,
    basis_source,
    coverage,
    drawing,
    files,
    life,
    saved_whole,
    selecting,
    stacking,
)
from randlora_jax.models.filled import refuse_abstract, refuse_misfit, refuse_traced
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.store import ArrayStore


class AdaptedModel(ABC):
    """A base model whose adapters come and go; `RandLoraModel` adds looking at them and files."""

    takes_sample_inputs = False  # it can be run abstractly, to tell its layers
    _registry: AdapterRegistry
    _hint = ""  # how this front end may find more layers

    @property
    @abstractmethod
    def _store(self) -> ArrayStore:
        """Where the arrays are."""

    # The life of adapters.

    def add_adapter(
        self,
        adapter_name: str,
        config: RandLoraConfig,
        *,
        rngs: Any = None,
        trainable: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a fresh adapter: lambda zero, gamma 1 / max(n, min), as PEFT initialises them.

        The first adapter of a model is active at once; others wait for `set_adapter`.

        Args:
          rngs: an ``nnx.Rngs`` or a ``jax.random.key``, for ``init_weights=False`` and, in nnx,
            adapter dropout.
          trainable: False keeps it from the optimizer and, in nnx, its dropout off, for which no
            `rngs` is needed, until ``model.train()``.
          autocast_adapter_dtype: False holds its numbers in the base model's bfloat16 or float16,
            where that is what it holds, instead of float32; as in PEFT.

        Raises:
          ConfigError: the name is taken, or no adapter can have it; `config` is no RandLoraConfig,
            or contradicts another adapter's, or scales updates beyond float32.
          TargetError: the configuration selects no layer.
        """
        self._check_new(adapter_name, rngs)
        life.check_flag("trainable", trainable)
        life.check_flag("autocast_adapter_dtype", autocast_adapter_dtype)
        config = expected_config(config)
        registry, store = self._registry, self._store
        layers = list({layer.name: layer for layer in self._selected(config).values()}.values())
        base = store.base_leaves()
        extents = basis_source.pair_extents([layer.matrix for layer in layers], config.r)
        dtypes = {files.kernel_dtype(base, layer) for layer in layers}
        identity, kept = basis_source.fresh(config, extents, dtypes)
        scaling = basis_source.scaling(config, identity, kept)
        spec = AdapterSpec(adapter_name, scaling, config.randlora_dropout, identity, extents)
        state = adapter_arrays.fresh_state(registry, base, config, layers, rngs)
        saved_whole.warn_of_unwritable(registry, adapter_name, state)
        saved_whole.warn_of_no_bias(registry, config, base, state)
        saved_whole.warn_of_no_parameter(registry, config, state)
        restored = files.Restored(spec, config, state, kept)
        self._add(store, restored, trainable, rngs, autocast_adapter_dtype)

    def _selected(self, config: RandLoraConfig) -> dict[str, Layer]:
        """The layers that `config` adapts; arrays that it cannot are told of where they matter."""
        left_out = coverage.left_out(self._registry, self._hint)
        every = config.target_modules == ALL_LINEAR
        if left_out and every:
            warn(f"{left_out}. model.coverage() lists all that is left out")
        try:
            return selecting.select(self._registry, config)
        except TargetError as error:
            if left_out and not every:
                raise TargetError(f"{error} Besides, {left_out}.") from error
            raise

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Applies and trains the named adapter or adapters, and no other.

        Args:
          inference_mode: apply without training.

        Raises:
          ConfigError: no such adapter, one of them is merged into the base, or two of them trained
            the same module whole.
        """
        life.check_flag("inference_mode", inference_mode)
        names = life.named(self._registry, adapter_name)
        chosen = life.chosen(self._registry, names, trainable=not inference_mode)
        self._trained_whole(names)
        self._follow(chosen)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; if it was the only active one, the first by name takes over.

        Raises:
          ConfigError: no such adapter, adapters are merged, or (in stacks) `set_rows` or a
            combination has it.
        """
        before, after = self._registry, life.deleted(self._registry, adapter_name)
        if set(after.active) - set(before.active):
            warn(f"adapter {adapter_name!r} was active; now {after.active[0]!r} is")
        store = self._store
        if after.stacks:
            self._follow(after, store)
            return
        store.remove(adapter_name)
        self._follow(after, store)
        self._refresh_pairs(store)

    def draw_bases(self) -> None:
        """Draws the shared bases anew: those of a model that was abstract, when it has been filled.

        A checkpoint of all the model's state holds its bases; one of adapter leaves alone does not.
        """
        store, registry = self._store, self._registry
        base = store.base_leaves()
        if registry.stacks:  # which have room for more than the adapters in them
            store.set_pairs(adapter_arrays.redrawn(registry, base, store.pairs()))
        else:
            store.set_pairs(adapter_arrays.shared_pairs(registry, base, self._states(store)))

    # Within.

    def _check_new(self, adapter_name: str, rngs: Any) -> None:
        """What every way to an adapter takes from the user.

        Raises:
          ConfigError: no adapter can have this name, or `rngs` cannot be drawn from.
        """
        checked_name(adapter_name)
        if rngs is not None:
            drawing.refuse_others(rngs)

    def _states(self, store: ArrayStore | None = None) -> dict[str, AdapterState]:
        """The arrays of every adapter as they are now."""
        return stacking.states(self._registry, store or self._store, self._registry.specs)

    def _numbers(self, adapter_names: Iterable[str]) -> dict[str, AdapterState]:
        """The arrays of the named adapters, whose numbers are wanted.

        Raises:
          ConfigError: the model is abstract, and has none, or they are of another rank.
        """
        registry, states = self._registry, self._fresh_states(adapter_names)
        for name, state in states.items():
            refuse_abstract([*state.layers.values(), *state.saved.values()])
            for layer, both in state.layers.items():
                refuse_misfit(registry.layers[layer], name, registry.specs[name].identity.r, *both)
        return states

    def _numbers_outside(self, adapter_names: Iterable[str], what: str) -> dict[str, AdapterState]:
        """As `_numbers`, for `what`, which takes them to host memory.

        Raises:
          ConfigError: as `_numbers`; or the model is traced.
        """
        states, base = self._numbers(adapter_names), self._store.base_leaves()
        arrays = [x for state in states.values() for x in (state.layers, state.saved)]
        refuse_traced([base, *arrays], what)
        return states

    def _pairs(self, states: Mapping[str, AdapterState]) -> dict[str, BasisPair]:
        """The shared pairs of adapters, of just what their layers slice.

        Raises:
          ConfigError: the model has come to hold other numbers.
        """
        store = self._store
        drawn = adapter_arrays.shared_pairs(self._registry, store.base_leaves(), states)
        held = store.pairs()
        for identity, pair in drawn.items():
            if identity in held and not adapter_arrays.is_corner(pair, held[identity]):
                raise ConfigError(
                    f"the shared bases {identity!r} of this model were changed, as an optimizer "
                    "for every nnx.Param does: no file could say so, and delta_W means what the "
                    "bases of their key make it. Train the adapter alone (wrt=AdapterParam); "
                    "model.draw_bases() puts the bases back"
                )
        return drawn

    def _trained_whole(self, adapter_names: Sequence[str]) -> dict[Path, jax.Array]:
        """What the named adapters trained whole, by path in the model.

        Raises:
          ConfigError: no such adapter, or two of them trained the same.
        """
        names = [self._registry.spec(name).name for name in adapter_names]
        return adapter_arrays.trained_whole(self._fresh_states(names))

    def _fresh_states(self, adapter_names: Iterable[str]) -> dict[str, AdapterState]:
        """The arrays of the named adapters.

        Raises:
          ConfigError: this is a copy, and its stacks do not hold what it was said to have.
        """
        registry, store, names = self._registry, self._store, list(adapter_names)
        stacking.refuse_stale(names, registry, store.slots())
        return stacking.states(registry, store, names)

    def _follow(self, registry: AdapterRegistry, store: ArrayStore | None = None) -> None:
        """From here on `registry` says what is; the store makes it so.

        Raises:
          ConfigError: this is a copy, and its stacks do not hold what it was said to have.
        """
        store = store or self._store
        if registry.stacks is self._registry.stacks:
            stacking.refuse_stale(self._registry.slots, self._registry, store.slots())
            stacking.refuse_lost(self._registry, store.slots())
        self._registry = registry
        store.follow(registry)
        if registry.stacks:
            store.set_slots(stacking.table(registry, store.pairs()))

    def _add(
        self,
        store: ArrayStore,
        adapter: files.Restored,
        trainable: bool,
        rngs: Any,
        autocast_adapter_dtype: bool,
    ) -> None:
        """Takes an adapter in, or refuses it and changes nothing."""
        spec, config, state, kept, carried = adapter
        after = life.added(self._registry, spec, config, kept, carried, trainable=trainable)
        base = store.base_leaves()
        if not autocast_adapter_dtype:
            state = adapter_arrays.in_base_dtype(after, base, state)
        state = adapter_arrays.placed(after, base, state)
        drawn = None
        if not after.stacks:
            drawn = _pairs_of(after, base, {**self._states(store), spec.name: state})
        self._follow(self._keep(store, after, spec, state, rngs), store)
        if drawn is not None:
            store.set_pairs(drawn)

    def _keep(
        self,
        store: ArrayStore,
        registry: AdapterRegistry,
        spec: AdapterSpec,
        state: AdapterState,
        rngs: Any,
    ) -> AdapterRegistry:
        """Hands the arrays of a new adapter to the store; the registry that is then true."""
        store.install(registry, spec, state, rngs)
        return registry

    def _refresh_pairs(self, store: ArrayStore) -> None:
        """Puts just the pairs in use in place of what there was."""
        store.set_pairs(_pairs_of(self._registry, store.base_leaves(), self._states(store)))


def _pairs_of(
    registry: AdapterRegistry, base: Mapping[Path, Any], states: Mapping[str, AdapterState]
) -> dict[str, BasisPair]:
    """One pair for each identity in use, of just the extents the layers slice.

    Of a model none of whose adapters has numbers yet, the shapes.
    """
    leaves = jax.tree.leaves([list(state.layers.values()) for state in states.values()])
    abstract = bool(leaves) and all(map(is_abstract, leaves))
    pairs = adapter_arrays.abstract_pairs if abstract else adapter_arrays.shared_pairs
    return pairs(registry, base, states)
