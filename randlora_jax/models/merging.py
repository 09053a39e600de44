"""A wrapped model with its adapters merged into the base model, or off."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.core.kept import Kept
from randlora_jax.core.update import Update
from randlora_jax.interop.errors import ConfigError, listed, warn
from randlora_jax.models import adapter_arrays, life
from randlora_jax.models.adapted import AdaptedModel
from randlora_jax.models.filled import refuse_abstract
from randlora_jax.models.names import Path, dotted


class MergingModel(AdaptedModel):
    """What merges deltas into the base kernels and takes them out, and switches adapters off."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is its base model: modules trained whole and biases included.

        (PEFT's biases stay trained.) `set_adapter` within chooses for afterwards. A function that
        was compiled outside and closes over the model cannot notice: pass the model, or its
        variables, as an argument. In nnx all adapters are frozen meanwhile, so that one program is
        the base model's whichever is active.
        """
        before, merged = self._registry, self._registry.merged
        if merged:
            self.unmerge_adapter()
        self._follow(life.disabled(self._registry))
        try:
            yield
        finally:
            within, after = self._registry, life.reenabled(self._registry, before)
            self._follow(after)
            if not within.active and set(after.active) - set(before.active):
                warn(f"what was active was deleted; now {after.active[0]!r} is active")
            if left := [name for name in merged if name in after.specs]:
                self.merge_adapter(left)

    def disable_adapter_layers(self) -> None:
        """From here on the model is its base model, until `enable_adapter_layers`.

        As `disable_adapter`, but for good: a second model of the same arrays becomes a reference::

            reference = nnx.merge(*nnx.split(model))
            reference.disable_adapter_layers()

        In nnx trained leaves stay `AdapterParam`, with gradients of zero, so that trainers see that
        the two share all else; linen's ``variables`` hold no adapter. Merged adapters are unmerged.

        Such models have the same Variables, adapters included. What one of them merges or unloads,
        or trained whole, is in that one alone. Of what trains there is one choice: where one of
        them makes it (`set_adapter`), the others warn when they are called. ``nnx.clone(model)``
        shares arrays alone.
        """
        if self._registry.merged:
            self.unmerge_adapter()
        self._follow(life.switched(self._registry, on=False))

    def enable_adapter_layers(self) -> None:
        """Applies the active adapters again; they train if they did before."""
        self._follow(life.switched(self._registry, on=True))

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds the deltas of the active (or named) adapters into the base kernels.

        Formed in float32 where they lie, and rounded once. The original kernels wait in host memory
        (`merged_bytes`), each process's own, until `unmerge_adapter` puts back their very bits.

        In nnx merged kernels are new Variables, and so are those that are put back: what holds on
        to the base model's own, to train it beside the adapter, must be given the model again. The
        adapter's Variables stay what they are, and a gradient of them is an error meanwhile.

        Args:
          safe_merge: check every merged kernel, and change nothing if one is not finite.

        Raises:
          ConfigError: no such adapter; adapters are off or in stacks; a kernel can take no update
            (a quantised one), or is a shape that waits for numbers; one that is active beside it
            trained a kernel whole that another adapts; or (with `safe_merge`) a kernel would not be
            finite.
        """
        life.check_flag("safe_merge", safe_merge)
        life.refuse_while_off(self._registry, "merge_adapter")
        life.refuse_while_stacked(self._registry, "merge_adapter")
        registry = self._registry
        asked = life.named_or_active(registry, adapter_names)
        wanted = [n for n in asked if n not in registry.merged]
        if not wanted:
            found = "all these adapters are merged already" if asked else "no adapter is active"
            warn(f"{found}: nothing to do")
            return
        self._refuse_covered(wanted, (*registry.active, *registry.merged, *wanted))
        store = self._store
        base = store.base_leaves()
        kernels = self._kernels_with(wanted, base, safe_merge)
        kept = registry.originals
        originals = {
            p: kept[p].then(base[p], x) if p in kept else Kept(base[p], x)
            for p, x in kernels.items()
        }
        store.set_base_leaves(kernels)
        self._follow(life.merged(registry, wanted, originals))

    def unmerge_adapter(self) -> None:
        """Puts the original kernels back, to the bit (PEFT subtracts, and keeps the rounding).

        Warns where a kernel was changed meanwhile: then the deltas are subtracted from it, so that
        the change stays.

        Raises:
          ConfigError: such a kernel can no longer take an update.
        """
        if not self._registry.merged:
            warn("no adapter is merged: nothing to do")
            return
        store, merged = self._store, self._registry.merged
        base, originals = store.base_leaves(), self._registry.originals
        changed = {p: base[p] for p, kept in originals.items() if kept.changed(base[p])}
        kernels = {p: kept.put_back(base[p]) for p, kept in originals.items() if p not in changed}
        if changed:
            kernels |= self._kernels_without(merged, changed)
            warn(
                f"{listed([dotted(path) for path in changed], 3)}: changed while {listed(merged)} "
                "was merged, so the delta was subtracted from what is there now, as in PEFT: the "
                "change stays, and the kernel is exact to rounding"
            )
        store.set_base_leaves(kernels)
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
        elif wanted := [name for name in names if name not in self._registry.merged]:
            life.refuse_while_off(self._registry, "merge_and_unload")
            self._refuse_covered(both := (*self._registry.merged, *wanted), both)
            store = self._store
            store.set_base_leaves(self._kernels_with(wanted, store.base_leaves(), safe_merge))
        return self._unwrapped(names)

    def unload(self) -> Any:
        """The base model without its adapters; as in PEFT, modules trained whole stay trained.

        Returns:
          what was wrapped, as `merge_and_unload`. This model must not be used afterwards.
        """
        if self._registry.merged:
            self.unmerge_adapter()
        return self._unwrapped([n for n in self._registry.active if n in self._registry.specs])

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
        refuse_abstract(base.values())
        updates = self._updates(adapter_names)
        kernels = adapter_arrays.merged_kernels(self._registry, base, updates)
        for path, kernel in kernels.items() if safe_merge else ():
            if not jnp.isfinite(kernel).all():
                raise ConfigError(
                    f"merging {adapter_names} into {'.'.join(map(str, path[:-1]))!r} gives numbers "
                    "that are not finite: an adapter is broken; nothing was merged"
                )
        return kernels

    def _refuse_covered(self, merging: Iterable[str], together: Iterable[str]) -> None:
        """Nothing, if no kernel into which adapters are merged makes room for a trained one.

        Raises:
          ConfigError: one does: the delta would be lost with it.
        """
        registry, states = self._registry, self._fresh_states(dict.fromkeys(together))
        whole = {path: name for name, state in states.items() for path in state.saved}
        for name in merging:
            for layer in (registry.layers[layer] for layer in states[name].layers):
                if other := whole.get(layer.kernel_path):
                    raise ConfigError(
                        f"{layer.name!r}: adapter {other!r} trained its kernel whole and {name!r} "
                        "adapts it; merging would add to a kernel that is not used. Such adapters "
                        "run together, and cannot be merged together (PEFT has no such pair)"
                    )

    def _kernels_without(
        self, adapter_names: Sequence[str], base: Mapping[Path, jax.Array]
    ) -> dict[Path, jax.Array]:
        """The kernels in `base` without the named adapters, which are merged in.

        Raises:
          ConfigError: a kernel takes no update.
        """
        minus = {
            name: [replace(update, scaling=-update.scaling) for update in updates]
            for name, updates in self._updates(adapter_names).items()
            if self._registry.layers[name].kernel_path in base
        }
        return adapter_arrays.merged_kernels(self._registry, base, minus)

    def _updates(self, adapter_names: Sequence[str]) -> dict[str, list[Update]]:
        """What each layer gets from the named adapters, by its name."""
        states = self._numbers_outside(adapter_names, "merge_adapter, merge_and_unload")
        return adapter_arrays.updates_by_layer(self._registry, states, self._pairs(states))

    def _unwrapped(self, adapter_names: Sequence[str]) -> Any:
        """The base model, with what the named adapters trained whole in place."""
        store = self._store
        base = store.base_leaves()
        saved = self._trained_whole(adapter_names)
        refuse_abstract(saved.values())
        store.set_base_leaves({path: x.astype(base[path].dtype) for path, x in saved.items()})
        return store.release()
