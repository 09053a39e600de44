"""The life of a wrapped model's adapters: PEFT's methods, over a registry and a store of arrays."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.mesh import kept_on_host, on_mesh, put_back
from randlora_jax.interop.adapter_name import checked_name
from randlora_jax.interop.config import ALL_LINEAR, RandLoraConfig, expected_config
from randlora_jax.interop.errors import ConfigError, shown, warn
from randlora_jax.models import (
    adapter_arrays,
    basis_source,
    coverage,
    files,
    life,
    stacking,
)
from randlora_jax.models.filled import refuse_abstract
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
          trainable: False keeps it from the optimizer.
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
        if config.target_modules == ALL_LINEAR:
            coverage.warn_of_left(registry, self._hint)
        base = store.base_leaves()
        layers = list({layer.name: layer for layer in registry.select(config).values()}.values())
        extents = basis_source.pair_extents([layer.matrix for layer in layers], config.r)
        dtype = files.kernel_dtype(base, layers)
        identity, kept = basis_source.fresh(config, extents, dtype)
        scaling = basis_source.scaling(config, identity, kept)
        spec = AdapterSpec(adapter_name, scaling, config.randlora_dropout, identity, extents)
        state = adapter_arrays.fresh_state(registry, base, config, layers, rngs)
        restored = files.Restored(spec, config, state, kept)
        self._add(store, restored, trainable, rngs, autocast_adapter_dtype)

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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is its base model: modules trained whole and biases included.

        (PEFT's biases stay trained.) A function that was compiled outside and closes over the
        model cannot notice: pass the model, or its variables, as an argument.
        """
        before, merged = self._registry, self._registry.merged
        if merged:
            self.unmerge_adapter()
        self._follow(life.disabled(self._registry))
        try:
            yield
        finally:
            now = self._registry
            self._follow(dataclasses.replace(now, active=before.active, trained=before.trained))
            if merged:
                self.merge_adapter(list(merged))

    def disable_adapter_layers(self) -> None:
        """From here on the model is its base model, until `enable_adapter_layers`.

        As `disable_adapter`, but for good: a second model of the same arrays becomes a reference,

            reference = nnx.merge(*nnx.split(model))
            reference.disable_adapter_layers()

        In nnx trained leaves stay `AdapterParam`, with gradients of zero, so that trainers see that
        the two share all else; linen's ``variables`` hold no adapter. Merged adapters are unmerged.
        """
        if self._registry.merged:
            self.unmerge_adapter()
        self._follow(life.switched(self._registry, on=False))

    def enable_adapter_layers(self) -> None:
        """Applies the active adapters again; they train if they did before."""
        self._follow(life.switched(self._registry, on=True))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; if it was the only active one, the first that is left takes over.

        Raises:
          ConfigError: no such adapter, or adapters are merged.
        """
        before, after = self._registry, life.deleted(self._registry, adapter_name)
        if set(after.active) - set(before.active):
            warn(f"adapter {adapter_name!r} was active; now {after.active[0]!r} is")
        store = self._store
        store.remove(adapter_name)
        self._follow(after, store)
        self._refresh_pairs(store)

    def draw_bases(self) -> None:
        """Draws the shared bases anew: those of a model that was abstract, when it has been filled.

        A checkpoint of all the model's state holds its bases; one of adapter leaves alone does not.
        """
        store = self._store
        store.set_pairs(adapter_arrays.shared_pairs(self._registry, self._states(store)))

    # Merging.

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds the deltas of the active (or named) adapters into the base kernels.

        Formed in float32 where they lie, and rounded once. The original kernels wait in host memory
        (`merged_bytes`), each process's own, until `unmerge_adapter` puts back their very bits.

        Args:
          safe_merge: check every merged kernel, and change nothing if one is not finite.

        Raises:
          ConfigError: no such adapter; adapters are off; or (with `safe_merge`) a kernel would not
            be finite.
        """
        life.check_flag("safe_merge", safe_merge)
        life.refuse_while_off(self._registry, "merge_adapter")
        life.refuse_while_stacked(self._registry, "merge_adapter")
        registry, store = self._registry, self._store
        asked = life.named_or_active(registry, adapter_names)
        wanted = [n for n in asked if n not in registry.merged]
        if not wanted:
            warn("all these adapters are merged already: nothing to do")
            return
        base = store.base_leaves()
        kernels = self._kernels_with(wanted, base, safe_merge)
        originals = {p: kept_on_host(base[p]) for p in kernels if p not in registry.originals}
        store.set_base_leaves(kernels)
        self._follow(life.merged(registry, wanted, originals))

    def unmerge_adapter(self) -> None:
        """Puts the original kernels back, to the bit (PEFT subtracts, and keeps the rounding)."""
        if not self._registry.merged:
            warn("no adapter is merged: nothing to do")
            return
        store = self._store
        base, originals = store.base_leaves(), self._registry.originals.items()
        store.set_base_leaves({p: put_back(x, on_mesh(base[p])) for p, x in originals})
        self._follow(life.unmerged(self._registry))

    @property
    def merged_bytes(self) -> int:
        """Bytes of this process's memory that hold original kernels while adapters are merged."""
        return sum(x.nbytes for x in self._registry.originals.values())

    def merge_and_unload(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool = False,
    ) -> Any:
        """The base model with the active (or named) adapters merged in, and no trace of adapters.

        Modules trained whole and biases take the place of the originals. This model must not be
        used afterwards.

        Args:
          dequantize: first give the base model float kernels in place of quantised ones, in the
            dtype of their scales. They are what was rounded, which the adapter was trained beside.

        Raises:
          ConfigError: as `merge_adapter`; two of the adapters trained the same module whole; or
            (with `dequantize`) nothing is quantised, or it cannot be read.

        Returns:
          what was wrapped: the nnx module, a bound linen module, the Hugging Face model.
        """
        life.check_flag("safe_merge", safe_merge)
        life.check_flag("dequantize", dequantize)
        names = life.named_or_active(self._registry, adapter_names)
        self._trained_whole(names)
        if dequantize:
            self._merge_into_floats(names, safe_merge)
        elif self._registry.stacks:
            life.refuse_while_off(self._registry, "merge_and_unload")
            store = self._store
            store.set_base_leaves(self._kernels_with(names, store.base_leaves(), safe_merge))
        elif not set(names) <= set(self._registry.merged):
            self.merge_adapter(names, safe_merge)
        return self._unwrapped(names)

    def unload(self) -> Any:
        """The base model without its adapters; as in PEFT, modules trained whole stay trained."""
        if self._registry.merged:
            self.unmerge_adapter()
        return self._unwrapped(self._registry.active)

    # Within.

    def _merge_into_floats(self, adapter_names: Sequence[str], safe_merge: bool) -> None:
        """Puts float kernels in place of quantised ones, the named adapters merged into all.

        Raises:
          ConfigError: as `merge_and_unload`; what was merged before is apart again.
        """
        life.refuse_while_off(self._registry, "merge_and_unload")
        refuse_abstract(self._store.base_leaves().values())
        floats = self._store.dequantised()
        if not floats:
            raise ConfigError("dequantize=True: no array of the base model is quantised by qwix")
        if self._registry.merged:
            adapter_names = tuple(dict.fromkeys((*self._registry.merged, *adapter_names)))
            self.unmerge_adapter()
        store = self._store
        kernels = self._kernels_with(adapter_names, {**store.base_leaves(), **floats}, safe_merge)
        store.set_base_leaves({path: x for path, x in kernels.items() if path not in floats})
        store.put_floats({path: kernels.get(path, x) for path, x in floats.items()})

    def _kernels_with(
        self, adapter_names: Sequence[str], base: Mapping[Path, jax.Array], safe_merge: bool
    ) -> dict[Path, jax.Array]:
        """The kernels in `base` with the named adapters merged in.

        Raises:
          ConfigError: a kernel takes none, or (with `safe_merge`) would not be finite.
        """
        states = self._numbers(adapter_names)
        refuse_abstract(base.values())
        updates = adapter_arrays.updates_by_layer(self._registry, states, self._pairs(states))
        kernels = adapter_arrays.merged_kernels(self._registry, base, updates)
        for path, kernel in kernels.items() if safe_merge else ():
            if not jnp.isfinite(kernel).all():
                raise ConfigError(
                    f"merging {adapter_names} into {'.'.join(map(str, path[:-1]))!r} gives numbers "
                    "that are not finite: an adapter is broken; nothing was merged"
                )
        return kernels

    def _check_new(self, adapter_name: str, rngs: Any) -> None:
        """What every way to an adapter takes from the user.

        Raises:
          ConfigError: no adapter can have this name, or `rngs` cannot be drawn from.
        """
        checked_name(adapter_name)
        if rngs is not None and not (_is_key(rngs) or callable(getattr(rngs, "params", None))):
            raise ConfigError(
                "rngs: expected nnx.Rngs(seed) or a key such as jax.random.key(seed), found "
                f"{shown(rngs)}"
            )

    def _states(self, store: ArrayStore | None = None) -> dict[str, AdapterState]:
        """The arrays of every adapter as they are now."""
        return stacking.states(self._registry, store or self._store, self._registry.specs)

    def _numbers(self, adapter_names: Iterable[str]) -> dict[str, AdapterState]:
        """The arrays of the named adapters, whose numbers are wanted.

        Raises:
          ConfigError: the model is abstract, and has none.
        """
        states = stacking.states(self._registry, self._store, adapter_names)
        for state in states.values():
            refuse_abstract([*state.layers.values(), *state.saved.values()])
        return states

    def _pairs(self, states: Mapping[str, AdapterState]) -> dict[str, BasisPair]:
        """The shared pairs of adapters, of just what their layers slice.

        Raises:
          ConfigError: the model has come to hold other numbers.
        """
        drawn, held = adapter_arrays.shared_pairs(self._registry, states), self._store.pairs()
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
        return adapter_arrays.trained_whole(stacking.states(self._registry, self._store, names))

    def _follow(self, registry: AdapterRegistry, store: ArrayStore | None = None) -> None:
        """From here on `registry` says what is; the store makes it so."""
        self._registry = registry
        store = store or self._store
        store.follow(registry)
        if registry.stacks:
            store.set_slots(stacking.table(registry))

    def _add(
        self,
        store: ArrayStore,
        adapter: files.Restored,
        trainable: bool,
        rngs: Any,
        autocast_adapter_dtype: bool,
    ) -> None:
        """Takes an adapter in, or refuses it and changes nothing."""
        spec, config, state, kept = adapter
        after = life.added(self._registry, spec, config, kept, trainable=trainable)
        base = store.base_leaves()
        if not autocast_adapter_dtype:
            state = adapter_arrays.in_base_dtype(after, base, state)
        state = adapter_arrays.placed(after, base, state)
        self._follow(self._keep(store, after, spec, state, rngs), store)
        if not after.stacks:
            self._refresh_pairs(store)

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
        """One pair for each identity in use, of just the extents the layers slice.

        Of a model none of whose adapters has numbers yet, the shapes.
        """
        states = self._states(store)
        leaves = jax.tree.leaves([list(state.layers.values()) for state in states.values()])
        abstract = bool(leaves) and all(map(is_abstract, leaves))
        pairs = adapter_arrays.abstract_pairs if abstract else adapter_arrays.shared_pairs
        store.set_pairs(pairs(self._registry, states))

    def _unwrapped(self, adapter_names: Sequence[str]) -> Any:
        """The base model, with what the named adapters trained whole in place."""
        store = self._store
        base = store.base_leaves()
        saved = self._trained_whole(adapter_names)
        refuse_abstract(saved.values())
        store.set_base_leaves({path: x.astype(base[path].dtype) for path, x in saved.items()})
        return store.release()


def _is_key(rngs: Any) -> bool:
    """Whether `rngs` is one of JAX's random keys, of the new kind or the old one."""
    if not isinstance(rngs, jax.Array):
        return False
    is_new = jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key)
    return rngs.ndim == 0 if is_new else rngs.ndim == 1 and rngs.dtype == jnp.uint32
