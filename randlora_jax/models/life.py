"""The life of an adapter: added, chosen, disabled, merged, unloaded. PEFT's names and meaning."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.bases import Bases, BasisIdentity, Box, draw, used_box
from randlora_jax.core.delta import Term
from randlora_jax.core.layers import AdapterSpec, Layer, kernel_delta
from randlora_jax.core.mesh import on_host, on_mesh
from randlora_jax.interop import targets
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models import files, origins
from randlora_jax.models.front_end import FrontEnd
from randlora_jax.models.names import TORCH_LEAF, Path, dotted
from randlora_jax.models.origins import Stored
from randlora_jax.models.registry import AdapterState


class Life(FrontEnd):
    """What happens to adapters after their model is wrapped."""

    @property
    def peft_config(self) -> dict[str, RandLoraConfig]:
        """Configuration of each adapter by name."""
        return dict(self._book.configs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are applied, in order."""
        return list(self._book.active)

    @property
    def targeted_module_names(self) -> list[str]:
        """Canonical names of every layer some adapter takes."""
        taken = {name for adapter in self._book.specs for name in self._state(adapter).layers}
        return [n for n, layer in self._book.owners().items() if layer.name in taken]

    def add_adapter(
        self, adapter_name: str, config: RandLoraConfig, *, rngs: Any = None, trainable: bool = True
    ) -> None:
        """Adds a fresh adapter: lambda zero, gamma 1 / max(n, min), as PEFT initialises them.

        The first adapter of a model is active at once; others wait for `set_adapter`.

        Args:
          rngs: an ``nnx.Rngs`` or a ``jax.random.key``, for ``init_weights=False`` and, in nnx,
            adapter dropout.
          trainable: False keeps it from the optimizer.

        Raises:
          ConfigError: the name is taken or the configuration contradicts another adapter's.
          TargetError: the configuration selects no layer.
        """
        chosen = self._book.select(config)
        box = self._book.box(chosen, config.r)
        layers = {layer.name: layer for layer in chosen.values()}
        dtype = files.base_dtype(self._base_leaves(), layers.values())
        identity, stored = origins.fresh(config, box, dtype)
        scaling = config.scaling * origins.unit(identity, stored)
        spec = AdapterSpec(adapter_name, scaling, config.randlora_dropout, identity, box)
        leaves = {
            name: self._fresh(layer, config, rngs, i)
            for i, (name, layer) in enumerate(layers.items())
        }
        state = AdapterState(leaves, self._trained_besides(config, layers))
        self._register(spec, config, state, trainable, rngs, stored)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Applies and trains the named adapter or adapters, and no other.

        Args:
          inference_mode: apply without training.

        Raises:
          ConfigError: no such adapter, or one of them is merged into the base.
        """
        chosen = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        for name in chosen:
            self._spec(name)
        self._refuse_while_merged("set_adapter")
        trained = frozenset() if inference_mode else frozenset(chosen)
        self._update(active=chosen, trained=trained)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is its base model: modules trained whole and biases included.

        (PEFT's biases stay trained.) A function that was compiled outside and closes over the
        model cannot notice: pass the model, or its variables, as an argument.
        """
        before, merged = self._book.active, self._book.merged
        if merged:
            self.unmerge_adapter()
        self._update(active=())
        try:
            yield
        finally:
            self._update(active=before)
            if merged:
                self.merge_adapter(list(merged))

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; if it was the only active one, the first that is left takes over.

        Raises:
          ConfigError: no such adapter, or adapters are merged.
        """
        self._spec(adapter_name)
        self._refuse_while_merged("delete_adapter")
        book = self._book
        configs = {n: c for n, c in book.configs.items() if n != adapter_name}
        specs = {n: s for n, s in book.specs.items() if n != adapter_name}
        active = tuple(n for n in book.active if n != adapter_name)
        if not active and specs:
            active = (next(iter(specs)),)
            warnings.warn(
                f"adapter {adapter_name!r} was active; now {active[0]!r} is", stacklevel=2
            )
        in_use = {spec.identity for spec in specs.values()}
        self._remove(adapter_name)
        self._update(
            configs=configs,
            specs=specs,
            active=active,
            trained=book.trained & set(specs) | (set(active) - set(book.active)),
            stored={i: pair for i, pair in book.stored.items() if i in in_use},
        )
        self._refresh_bases()

    # Merging.

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds the deltas of the active (or named) adapters into the base kernels.

        Formed in float32 and rounded once. The original kernels wait in host memory
        (`merged_bytes`) until `unmerge_adapter` puts back their very bits.

        Args:
          safe_merge: check every merged kernel, and change nothing if one is not finite.

        Raises:
          ConfigError: no such adapter, or (with `safe_merge`) a kernel would not be finite.
        """
        wanted = [n for n in (adapter_names or self._book.active) if n not in self._book.merged]
        if not wanted:
            warnings.warn("all these adapters are merged already: nothing to do", stacklevel=2)
            return
        base, merged, originals = self._base_leaves(), {}, dict(self._book.originals)
        for layer, terms in self._terms_by_layer(wanted).items():
            path = self._book.layers[layer].kernel_path
            kernel = base[path]
            change = kernel_delta(terms, self._book.layers[layer].view, kernel.shape)
            whole = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
            merged[path] = jax.device_put(whole, on_mesh(kernel))
            if safe_merge and not jnp.isfinite(merged[path]).all():
                raise ConfigError(
                    f"merging {wanted} into {layer!r} gives numbers that are not finite: an "
                    "adapter is broken; nothing was merged"
                )
            originals.setdefault(path, on_host(kernel))
        self._set_base_leaves(merged)
        self._update(merged=(*self._book.merged, *wanted), originals=originals)

    def unmerge_adapter(self) -> None:
        """Puts the original kernels back, to the bit (PEFT subtracts, and keeps the rounding)."""
        if not self._book.merged:
            warnings.warn("no adapter is merged: nothing to do", stacklevel=2)
            return
        base = self._base_leaves()
        originals = self._book.originals.items()
        self._set_base_leaves({p: jax.device_put(x, on_mesh(base[p])) for p, x in originals})
        self._update(merged=(), originals={})

    @property
    def merged_bytes(self) -> int:
        """Bytes of host memory that hold original kernels while adapters are merged."""
        return sum(x.nbytes for x in self._book.originals.values())

    def merge_and_unload(
        self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """The base model with the active (or named) adapters merged in, and no trace of adapters.

        Modules trained whole and biases take the place of the originals. This model must not be
        used afterwards.

        Returns:
          what was wrapped: the nnx module, a bound linen module, the Hugging Face model.
        """
        names = [n for n in (adapter_names or self._book.active) if n not in self._book.merged]
        if names:
            self.merge_adapter(names, safe_merge)
        return self._unwrapped(adapter_names or self._book.active)

    def unload(self) -> Any:
        """The base model without its adapters; as in PEFT, modules trained whole stay trained."""
        if self._book.merged:
            self.unmerge_adapter()
        return self._unwrapped(self._book.active)

    def _unwrapped(self, adapter_names: Sequence[str]) -> Any:
        base = self._base_leaves()
        saved = {path: x for n in adapter_names for path, x in self._state(n).saved.items()}
        self._set_base_leaves({path: x.astype(base[path].dtype) for path, x in saved.items()})
        self._update(originals={})
        return self._release()

    # Within.

    def _update(self, **changes: Any) -> None:
        self._book = dataclasses.replace(self._book, **changes)
        self._sync()

    def _spec(self, adapter_name: str) -> AdapterSpec:
        if adapter_name not in self._book.specs:
            raise ConfigError(
                f"no adapter named {adapter_name!r}; this model has {sorted(self._book.specs)}"
            )
        return self._book.specs[adapter_name]

    def _refuse_while_merged(self, what: str) -> None:
        if self._book.merged:
            raise ConfigError(
                f"{what}: {list(self._book.merged)} are merged into the base; call "
                "unmerge_adapter() first"
            )

    def _register(
        self,
        spec: AdapterSpec,
        config: RandLoraConfig,
        state: AdapterState,
        trainable: bool,
        rngs: Any,
        stored: Stored,
    ) -> None:
        book = self._book
        if spec.name in book.specs:
            raise ConfigError(
                f"an adapter named {spec.name!r} is already here; choose another name or delete it"
            )
        self._refuse_while_merged("add_adapter")
        self._check_against_others(config)
        self._install(spec, self._placed(state), rngs)
        self._update(
            configs={**book.configs, spec.name: config},
            specs={**book.specs, spec.name: spec},
            stored={**book.stored, **stored},
            active=book.active or (spec.name,),
            trained=book.trained | ({spec.name} if trainable else set()),
        )
        self._refresh_bases()

    def _check_against_others(self, config: RandLoraConfig) -> None:
        """PEFT's rule: all adapters of a model share key and save_projection."""
        for name, other in self._book.configs.items():
            for key in ("projection_prng_key", "save_projection"):
                ours, theirs = getattr(config, key), getattr(other, key)
                if ours != theirs:
                    raise ConfigError(
                        f"{key}={ours} differs from adapter {name!r}, which has {theirs}: all "
                        "adapters of one model must share it, as in PEFT"
                    )

    def _fresh(
        self, layer: Layer, config: RandLoraConfig, rngs: Any, index: int
    ) -> tuple[jax.Array, jax.Array]:
        _, n, smallest = used_box(layer.matrix, config.r)
        largest = max(n, smallest) if config.init_weights else max(layer.matrix)
        # PEFT makes gamma in the base layer's dtype and keeps it in float32 afterwards
        dtype = self._base_leaves()[layer.kernel_path].dtype
        gamma = jnp.full((*layer.stack, n, smallest), 1 / largest, dtype).astype(jnp.float32)
        shape = (*layer.stack, config.r, n)
        if config.init_weights:
            return jnp.zeros(shape, jnp.float32), gamma
        if rngs is None:
            raise ConfigError(
                "init_weights=False draws lambda at random: pass rngs=nnx.Rngs(seed) or a jax key"
            )
        key = jax.random.fold_in(rngs if isinstance(rngs, jax.Array) else rngs.params(), index)
        return jax.random.normal(key, shape, jnp.float32), gamma

    def _trained_besides(
        self, config: RandLoraConfig, chosen: Mapping[str, Layer]
    ) -> dict[Path, jax.Array]:
        """Copies of the base leaves that this adapter trains whole: modules_to_save and biases."""
        patterns = targets.saved_modules(config)
        saved = {}
        for path, leaf in self._base_leaves().items():
            bias = TORCH_LEAF.get(path[-1]) == "bias" and (
                config.bias == "all"
                or (config.bias == "randlora_only" and dotted(path[:-1]) in chosen)
            )
            module = self._book.names.first(path[:-1])
            if bias or targets.inside_saved(module, patterns):
                saved[path] = jnp.asarray(leaf, jnp.float32)
        return saved

    def _terms_by_layer(self, adapter_names: Sequence[str]) -> dict[str, list[Term]]:
        """What each layer gets from the named adapters."""
        terms: dict[str, list[Term]] = {}
        for name in adapter_names:
            spec, state = self._spec(name), self._state(name)
            bases = self._pair(spec.identity, self._extents(spec, state))
            for layer, (lam, gamma) in state.layers.items():
                terms.setdefault(layer, []).append(Term(lam, gamma, bases, spec.scaling))
        return terms

    # Bases.

    def _refresh_bases(self) -> None:
        """One pair for each identity in use, of just the extents the layers slice."""
        boxes: dict[BasisIdentity, Box] = {}
        for name, spec in self._book.specs.items():
            box = self._extents(spec, self._state(name))
            boxes[spec.identity] = box.union(boxes.get(spec.identity, box))
        self._set_bases({i: self._pair(i, box) for i, box in boxes.items()})

    def _extents(self, spec: AdapterSpec, state: AdapterState) -> Box:
        box = Box(0, 0, 0)
        for name in state.layers:
            box = box.union(used_box(self._book.layers[name].matrix, spec.identity.r))
        return box

    def _pair(self, identity: BasisIdentity, box: Box) -> Bases:
        if identity not in self._book.stored:
            return draw(identity, box, self._book.replicated)
        pair = self._book.stored[identity]  # (r, 1, MIN), (MAX, N, r)
        a, b = pair if identity.kind == "dense" else origins.integers(pair)[0]
        return Bases(self._put(a[:, 0, : box.min]), self._put(b[: box.max, : box.n]))

    def _put(self, x: jax.Array | np.ndarray) -> jax.Array:
        """`x` on every device that holds the base model."""
        return jax.device_put(jnp.asarray(x), self._book.replicated)

    def _placed(self, state: AdapterState) -> AdapterState:
        layers = {n: (self._put(lam), self._put(gamma)) for n, (lam, gamma) in state.layers.items()}
        base = self._base_leaves()
        saved = {p: jax.device_put(x, on_mesh(base[p])) for p, x in state.saved.items()}
        return AdapterState(layers, saved)
