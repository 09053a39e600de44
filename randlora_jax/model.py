"""RandLoraModel: what an adapted model can do, whichever framework holds its arrays.

The story: choose layers (`targets`), size and draw the bases (`bases`), give each chosen layer its
lambda and gamma, and hand them to a front end, which puts them where its framework finds them. The
front ends (`linen`, `nnx`) only store arrays and run layers; every decision is made here.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import files, origins, targets
from randlora_jax.bases import Bases, BasisIdentity, Box, draw, used_box
from randlora_jax.book import AdapterState, Book
from randlora_jax.config import RandLoraConfig
from randlora_jax.delta import Apply, Term, delta
from randlora_jax.errors import ConfigError
from randlora_jax.interop.peft_dir import write_adapter
from randlora_jax.layers import AdapterSpec, Layer
from randlora_jax.names import Names, Path, Rules, dotted
from randlora_jax.origins import Stored
from randlora_jax.views import Views


class RandLoraModel:
    """A base model with RandLoRA adapters; made by `get_peft_model` or `from_pretrained`.

    Names and meaning follow PEFT's ``RandLoraModel`` and ``PeftModel``.
    """

    _book: Book

    # What a front end provides.

    def _base_leaves(self) -> Mapping[Path, jax.Array]:
        """Every frozen leaf of the base model by path."""
        raise NotImplementedError

    def _install(self, spec: AdapterSpec, state: AdapterState, trainable: bool, rngs: Any) -> None:
        """Stores an adapter's arrays; `_book` already lists it. `rngs` is for dropout."""
        raise NotImplementedError

    def _state(self, adapter_name: str) -> AdapterState:
        """The arrays of an adapter as they are now."""
        raise NotImplementedError

    def _trainable_leaves(self) -> list[jax.Array]:
        """What an optimizer sees."""
        raise NotImplementedError

    def _set_bases(self, bases: Mapping[BasisIdentity, Bases]) -> None:
        """Replaces the shared pairs on the device."""
        raise NotImplementedError

    # Adapters.

    @property
    def peft_config(self) -> dict[str, RandLoraConfig]:
        """Configuration of each adapter by name."""
        return dict(self._book.configs)

    @property
    def targeted_module_names(self) -> list[str]:
        """Canonical names of every layer some adapter takes."""
        taken = {name for adapter in self._book.specs for name in self._state(adapter).layers}
        return [n for n, layer in self._book.owners().items() if layer.name in taken]

    def add_adapter(
        self, adapter_name: str, config: RandLoraConfig, *, rngs: Any = None, trainable: bool = True
    ) -> None:
        """Adds a fresh adapter: lambda zero, gamma 1 / max(n, min), as PEFT initialises them.

        Args:
          rngs: an ``nnx.Rngs`` or a ``jax.random.key``; needed only for ``init_weights=False``.

        Raises:
          ConfigError: the name is taken or the configuration contradicts another adapter's.
          TargetError: the configuration selects no layer.
        """
        chosen = self._book.select(config)
        box = self._book.box(chosen, config.r)
        layers = {layer.name: layer for layer in chosen.values()}
        identity, stored = origins.fresh(
            config, box, files.base_dtype(self._base_leaves(), layers.values())
        )
        spec = AdapterSpec(adapter_name, config.scaling, config.randlora_dropout, identity, box)
        state = AdapterState(
            {
                name: self._fresh(layer, config, rngs, i)
                for i, (name, layer) in enumerate(layers.items())
            },
            self._trained_besides(config, layers),
        )
        self._register(spec, config, state, trainable, rngs, stored)

    def _register(
        self,
        spec: AdapterSpec,
        config: RandLoraConfig,
        state: AdapterState,
        trainable: bool,
        rngs: Any,
        stored: Stored,
    ) -> None:
        if spec.name in self._book.specs:
            raise ConfigError(
                f"an adapter named {spec.name!r} is already here; choose another name or delete it"
            )
        self._check_against_others(config)
        self._book = dataclasses.replace(
            self._book,
            configs={**self._book.configs, spec.name: config},
            specs={**self._book.specs, spec.name: spec},
            stored={**self._book.stored, **stored},
        )
        self._install(spec, state, trainable, rngs)
        self._refresh_bases()

    def _check_against_others(self, config: RandLoraConfig) -> None:
        """PEFT's rule: all adapters of a model share key and save_projection."""
        for name, other in self._book.configs.items():
            for key in ("projection_prng_key", "save_projection"):
                ours, theirs = getattr(config, key), getattr(other, key)
                if ours != theirs:
                    raise ConfigError(
                        f"{key}={ours} differs from adapter {name!r}, which has {theirs}: all "
                        f"adapters of one model must share it, as in PEFT"
                    )

    def _fresh(
        self, layer: Layer, config: RandLoraConfig, rngs: Any, index: int
    ) -> tuple[jax.Array, jax.Array]:
        _, n, smallest = used_box(layer.matrix, config.r)
        largest = max(n, smallest) if config.init_weights else max(layer.matrix)
        # PEFT makes gamma in the base layer's dtype and keeps it in float32 afterwards
        dtype = self._base_leaves()[(*layer.path, "kernel")].dtype
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
            bias = path[-1] == "bias" and (
                config.bias == "all"
                or (config.bias == "randlora_only" and dotted(path[:-1]) in chosen)
            )
            module = self._book.names.first(path[:-1])
            if bias or targets.inside_saved(module, patterns):
                saved[path] = jnp.asarray(leaf, jnp.float32)
        return saved

    # Bases.

    def _refresh_bases(self) -> None:
        """One pair for each identity in use, of just the extents the layers slice."""
        boxes: dict[BasisIdentity, Box] = {}
        for name, spec in self._book.specs.items():
            for layer in self._state(name).layers:
                box = used_box(self._book.layers[layer].matrix, spec.identity.r)
                boxes[spec.identity] = box.union(boxes.get(spec.identity, box))
        self._set_bases({i: self._pair(i, box) for i, box in boxes.items()})

    def _pair(self, identity: BasisIdentity, box: Box) -> Bases:
        if identity not in self._book.stored:
            return draw(identity, box)
        a, b = self._book.stored[identity]  # (r, 1, MIN), (MAX, N, r)
        return Bases(jnp.asarray(a[:, 0, : box.min]), jnp.asarray(b[: box.max, : box.n]))

    # Looking and counting.

    def delta_weights(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """delta_W of every adapted layer by canonical name, (out, in) float32, scaling included.

        A stack that no names rule names has one entry, (*stack, out, in).
        """
        spec = self._spec(adapter_name)
        state = self._state(adapter_name)
        layers = [self._book.layers[name] for name in state.layers]
        box = Box(0, 0, 0)
        for layer in layers:
            box = box.union(used_box(layer.matrix, spec.identity.r))
        bases = self._pair(spec.identity, box)
        found: dict[str, np.ndarray] = {}
        for layer in layers:
            form = partial(_torch_delta, bases, spec.scaling, *layer.matrix)
            for _ in layer.stack:
                form = jax.vmap(form)
            found |= layer.split(np.asarray(form(*state.layers[layer.name])))
        return found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained numbers, all numbers), bases excluded as they are in PEFT's count."""
        trained = sum(x.size for x in self._trainable_leaves())
        adapters = sum(self._state(name).size() for name in self._book.specs)
        return trained, adapters + sum(x.size for x in self._base_leaves().values())

    def print_trainable_parameters(self) -> None:
        """Prints the count in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def _spec(self, adapter_name: str) -> AdapterSpec:
        if adapter_name not in self._book.specs:
            raise ConfigError(
                f"no adapter named {adapter_name!r}; this model has {sorted(self._book.specs)}"
            )
        return self._book.specs[adapter_name]

    # Files.

    def save_pretrained(self, directory: str | FilePath) -> None:
        """Writes PEFT adapter directories: "default" at the root, others in folders of their name.

        Each is written atomically and holds one copy of its bases, of the extents PEFT expects.

        Raises:
          RandLoraError: something cannot be written as PEFT reads it; nothing was written.
        """
        for name, adapter in [
            (n, files.export(self._book, n, self._state(n))) for n in self._book.specs
        ]:
            write_adapter(FilePath(directory) / ("" if name == "default" else name), adapter)

    def load_adapter(
        self,
        directory: str | FilePath,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        rngs: Any = None,
        torch_generation: str | None = None,
    ) -> None:
        """Adds the adapter stored in a PEFT directory, in our or in PEFT's own variants.

        Args:
          torch_generation: for a file without bases (``save_projection=False``), the draw of the
            torch release it was trained under, such as "bf16-8bit" (``docs/torch-generations.md``).

        Raises:
          AdapterFileError: the files are damaged, incomplete or hold non-finite numbers.
          TargetError: the adapter's layers and this model's do not fit together.
        """
        spec, config, state, stored = files.restore(
            self._book, self._base_leaves(), directory, adapter_name, torch_generation
        )
        if not is_trainable:
            config = dataclasses.replace(config, inference_mode=True)
        self._register(spec, config, state, is_trainable, rngs, stored)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: str | FilePath,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        apply: Apply = "auto",
        rngs: Any = None,
        views: Mapping[str, str] | None = None,
        names: Rules | None = None,
        torch_generation: str | None = None,
    ) -> Self:
        """Wraps `model` with the adapter stored in `directory`.

        Args:
          model: as for `get_peft_model`.
          is_trainable: the adapter's numbers are trained on; else they are frozen like the base.
          apply, rngs, views, names: as for `get_peft_model`.
          torch_generation: as for `load_adapter`.
        """
        wrapped = wrap(model, apply, views, names)
        wrapped.load_adapter(
            directory, adapter_name, is_trainable, rngs=rngs, torch_generation=torch_generation
        )
        return wrapped  # type: ignore[return-value]


def _torch_delta(
    bases: Bases, scaling: float, n_in: int, n_out: int, lam: jax.Array, gamma: jax.Array
) -> jax.Array:
    return delta(Term(lam, gamma, bases, scaling), n_in, n_out).T


def wrap(
    model: Any,
    apply: Apply,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
) -> RandLoraModel:
    """The front end for `model`, with no adapter yet.

    Raises:
      ConfigError: `model` is of no kind that a front end knows, or `apply` no way to apply.
    """
    import flax.linen
    import flax.nnx

    from randlora_jax.linen import HuggingFaceRandLora, LinenRandLora
    from randlora_jax.nnx import NnxRandLora

    if apply not in ("auto", "factored", "merged"):
        raise ConfigError(f"apply={apply!r}: expected 'auto', 'factored' or 'merged'")
    rules = Views(views or {}), Names(names or {})
    if isinstance(model, flax.nnx.Module):
        return NnxRandLora(model, apply, *rules)
    if isinstance(model, flax.linen.Module):
        return LinenRandLora(model, apply, *rules)
    if isinstance(getattr(model, "module", None), flax.linen.Module):
        return HuggingFaceRandLora(model, apply, *rules)
    raise ConfigError(
        f"cannot wrap a {type(model).__name__}: expected a flax.nnx.Module, a flax.linen module "
        "bound to its variables (module.bind(variables)) or a Hugging Face Flax model"
    )


def get_peft_model(
    model: Any,
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
) -> RandLoraModel:
    """Wraps `model` with a fresh RandLoRA adapter; before training it computes what `model` does.

    Args:
      model: a ``flax.nnx.Module`` (its layers are replaced in place, as PEFT does), a
        ``flax.linen`` module bound to its variables, or a Hugging Face ``FlaxPreTrainedModel``.
      config: what to adapt and how.
      apply: how layers apply the adapter: "auto" takes the cheaper exact way per layer, "factored"
        and "merged" insist on one. Belongs to the run and is never saved.
      rngs: an ``nnx.Rngs`` or a jax key, for ``init_weights=False`` and, in nnx, adapter dropout.
      views: kernel layouts that types do not tell, by regular expressions on layer paths, such as
        ``{"layers/mlp/.*": "s i o"}`` for scanned Dense layers (`randlora_jax.views`).
      names: rules from module paths to PyTorch's, where they differ (`randlora_jax.names.Names`).

    Raises:
      ConfigError: `model` or `config` cannot be used.
      TargetError: `config` selects no layer of `model`.
    """
    wrapped = wrap(model, apply, views, names)
    wrapped.add_adapter(adapter_name, config, rngs=rngs)
    return wrapped
