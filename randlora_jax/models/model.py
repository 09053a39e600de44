"""RandLoraModel: what an adapted model can do, whichever framework holds its arrays.

The story: choose layers (`interop.targets`), say where the bases come from (`basis_source`), give
each chosen layer its lambda and gamma (`adapter_arrays`), note it in the registry (`life`), and
hand the arrays to a store, which puts them where its framework finds them (`adapted` tells it).
"""

import dataclasses
import math
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path as FilePath
from typing import Any, cast

import jax
import numpy as np
import numpy.typing as npt

from randlora_jax.core.mesh import alone_among_processes
from randlora_jax.core.update import Update
from randlora_jax.core.ways import Apply, ExecutionOptions
from randlora_jax.interop import hub
from randlora_jax.interop.adapter_name import saving_folder
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError, listed, shown, warn
from randlora_jax.interop.peft_dir import write_adapter
from randlora_jax.interop.strict_json import write_text
from randlora_jax.models import adapter_arrays, coverage, files, reports, settings, stacking, status
from randlora_jax.models.adapter_arrays import Leaves
from randlora_jax.models.coverage import Coverage
from randlora_jax.models.front_end import WrapRules, given_back, stated_names, wrap
from randlora_jax.models.layer import Layer, LayerRun
from randlora_jax.models.layer_types import Table
from randlora_jax.models.life import check_flag
from randlora_jax.models.many import ManyAdapters
from randlora_jax.models.memory import Memory, memory
from randlora_jax.models.names import Rules
from randlora_jax.models.quantised import is_beside_integers
from randlora_jax.models.status import TunerLayerStatus, TunerModelStatus


class RandLoraModel(ManyAdapters):
    """A base model with RandLoRA adapters; made by `get_peft_model` or `from_pretrained`.

    Names and meaning follow PEFT's ``RandLoraModel`` and ``PeftModel``.
    """

    @property
    @abstractmethod
    def _base_name(self) -> str:
        """Of the class of the base model."""

    def _runs(self, layers: Sequence[Layer], base: Leaves) -> dict[str, LayerRun]:
        """How layers run, by name, as far as it is known before they are called."""
        return {
            layer.name: LayerRun(
                layer.type.call if layer.type else None,
                files.kernel_dtype(base, layer),
            )
            for layer in layers
        }

    # Looking and counting.

    def __repr__(self) -> str:
        """The class, the adapters, which are active, what they train; no arrays."""
        return reports.summary(type(self).__name__, self._base_name, self._registry, self._states())

    @property
    def peft_config(self) -> dict[str, RandLoraConfig]:
        """Configuration of each adapter by name."""
        return dict(self._registry.configs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are applied, in order; or would be, were they not off."""
        return list(self._registry.active)

    @property
    def targeted_module_names(self) -> list[str]:
        """Canonical names of every layer some adapter takes."""
        taken = {name for state in self._states().values() for name in state.layers}
        return [n for n, layer in self._registry.owners().items() if layer.name in taken]

    def delta_weights(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """delta_W of every adapted layer by canonical name, (out, in) float32, scaling included.

        A stack has an entry for each of its matrices.

        Raises:
          ConfigError: no such adapter, or the model is abstract, or traced.
        """
        states = self._numbers_outside([self._registry.spec(adapter_name).name], "delta_weights")
        pairs = self._pairs(states)
        found: dict[str, np.ndarray] = {}
        updates = adapter_arrays.updates_by_layer(self._registry, states, pairs)
        for name, (update,) in updates.items():
            transposed = np.asarray(jax.jit(_torch_delta)(update))
            found |= self._registry.layers[name].split(transposed)
        return found

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained numbers, all numbers), bases excluded as they are in PEFT's count.

        None are trained while the adapters are off. Of a quantised array its integers count, and no
        scales, likewise.
        """
        states, registry = self._states(), self._registry
        parts = (registry.trained_part(n, states[n]) for n in registry.training)
        trained = sum(part.size() for part in parts) * registry.enabled
        leaves = self._store.base_leaves()
        sizes = {p: x.size for p, x in leaves.items() if not is_beside_integers(p, leaves)}
        for layer in registry.layers.values():
            sizes[layer.kernel_path] = math.prod(layer.shape)  # which may be packed
        base = sum(sizes.values())
        added = (adapter_arrays.added_size(registry, n, s) for n, s in states.items())
        return trained, base + sum(added)

    def print_trainable_parameters(self) -> None:
        """Prints the count in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trained / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """As PEFT's: of every adapted matrix and every module that is trained whole.

        Raises:
          ConfigError: the model has no adapter.
        """
        return status.layer_status(self._registry, self._store.base_leaves(), self._states())

    def get_model_status(self) -> TunerModelStatus:
        """As PEFT's: of all layers together.

        Raises:
          ConfigError: the model has no adapter.
        """
        layers, count = self.get_layer_status(), self.get_nb_trainable_parameters()
        return status.model_status(self._registry, self._base_name, count, layers)

    def coverage(self) -> Coverage:
        """What the adapters take, train whole and leave out, array by array; prints as a table."""
        return coverage.coverage(self._registry, self._states())

    def memory(self) -> Memory:
        """Bytes on one device by kind, with AdamW in mind; of an abstract model, too."""
        store, states, registry = self._store, self._states(), self._registry
        if registry.stacks:  # with room for more
            states = {stack.name: store.state(stack.name) for stack in registry.stacks}
        arrays = {name: (state.layers, state.saved) for name, state in states.items()}
        parts = [registry.trained_part(n, states[n]) for n in registry.training]
        moving = [(part.layers, part.saved) for part in parts if registry.enabled]
        return memory(dict(store.base_leaves()), dict(store.pairs()), arrays, moving)

    def explain(
        self, tokens: int, adapter_name: str = "default", *, rows: int | None = None
    ) -> str:
        """Which way each pass of each layer takes, what it costs, and what it cannot take.

        One entry for each kind of layer, as it runs without dropout (`randlora_jax.core.ways`).

        Args:
          tokens: rows of a layer's input on one device: batch times length.
          rows: of a batch on one device, where each row has an adapter of its own, all such as
            `adapter_name`: what is formed of these in a forward pass (`randlora_jax.core.rows`).

        Raises:
          ConfigError: no such adapter, `tokens` is no positive number, or not one times `rows`.
        """
        if not isinstance(tokens, Integral) or tokens < 1:
            raise ConfigError(f"tokens: expected a positive integer, found {shown(tokens)}")
        if rows is not None and (not isinstance(rows, Integral) or rows < 1 or tokens % rows):
            raise ConfigError(
                f"rows: expected how many rows share {tokens} tokens evenly, found {shown(rows)}"
            )
        spec = self._registry.spec(adapter_name)
        base = self._store.base_leaves()
        adapted = stacking.states(self._registry, self._store, [adapter_name])[adapter_name].layers
        layers = [self._registry.layers[name] for name in adapted]
        runs, r = self._runs(layers, base), spec.identity.r
        # the way that a user asks for is of what is trained: rows always run beside
        options = self._registry.options if rows is None else ExecutionOptions()
        return reports.explained(
            layers, base, runs, r, int(tokens), options, None if rows is None else int(rows)
        )

    # Checkpoints.

    def randlora_settings(self) -> dict[str, Any]:
        """What the adapters' leaves mean, by adapter, for JSON: to be saved beside them.

        ``config`` holds the arguments of `RandLoraConfig`; ``bases`` names the shared pair;
        ``layers`` and ``trained_whole`` have the shapes of what is adapted, by path in the model;
        ``scale`` is what `set_scale` set; ``trains`` tells whether its leaves are among what trains
        and ``merged`` whether the kernels hold it.
        """
        return settings.settings_of(self._registry, self._states())

    def check_randlora_settings(self, saved: Any) -> None:
        """Nothing, if leaves that were saved beside the settings `saved` belong in this model.

        Call it before they are restored: leaves of one shape fit models of any alpha and any bases.
        What decides nothing, such as dropout, may differ, and the model may have more adapters.

        Raises:
          ConfigError: they would mean something else here; it names the setting.
        """
        settings.refuse_others(self.randlora_settings(), saved)
        settings.warn_of_idle(saved, self._states())

    # Files.

    def save_pretrained(self, directory: str | FilePath, *, names: Rules | None = None) -> None:
        """Writes PEFT adapter directories: "default" at the root, others in folders of their name.

        Each is written atomically and holds one copy of its bases, of the extents PEFT expects. Of
        several processes (``jax.distributed``) all call this, and the first one writes.

        Warns where PEFT could not open all of them in one PyTorch model, and where layers are named
        as in the JAX model.

        Args:
          names: rules from layer paths to PyTorch's names (`Names`), as `get_peft_model` takes
            them; they come before those given there. Who reads the files here gives them again.

        Raises:
          RandLoraError: something cannot be written as PEFT reads it, or `directory` cannot be
            one; nothing was written.
        """
        renamed = stated_names(names)
        if not self._registry.specs:
            raise ConfigError("this model has no adapter to save: add one first")
        combined = list(filter(self._registry.combination, self._registry.slots))
        if combined:
            warn(f"{listed(combined)} combine adapters: no file can hold them, and none is written")
        held = self._numbers_outside(self._registry.specs, "save_pretrained")
        self._pairs(held)  # they are what will be written
        base = self._store.base_leaves()
        whole = {n: files.with_carried(self._registry, base, n, s) for n, s in held.items()}
        states = {name: state.on_host() for name, state in whole.items()}
        with alone_among_processes("save_pretrained") as first:
            if not first:
                return
            folders = {name: saving_folder(directory, name) for name in states}
            adapted = {name for state in states.values() for name in state.layers}
            registry = self._registry.renamed(renamed, base, adapted)
            adapters = {n: files.export(registry, n, s) for n, s in states.items()}
            files.warn_if_apart(adapters)
            files.warn_of_own_names(registry, states)
            for name, adapter in adapters.items():
                write_adapter(folders[name], adapter)
                card = folders[name] / hub.CARD_NAME
                trained = registry.trained_part(name, states[name]).size()
                text = hub.model_card(adapter.config, len(adapter.layers), trained)
                with suppress(FileExistsError):  # the user's own words stay
                    write_text(card, text, overwrite=False)

    def push_to_hub(self, repo_id: str, **options: Any) -> str | None:
        """Saves to the Hugging Face hub, in one commit; a repository that is missing is made.

        Of several processes all call this, and the first one pushes.

        Args:
          options: ``token`` and ``private``, and whatever else ``HfApi.upload_folder`` takes, such
            as ``revision`` and ``commit_message``.

        Returns:
          the address of the commit; None in the other processes.

        Raises:
          RandLoraError: as `save_pretrained`; or huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            with alone_among_processes("push_to_hub") as first:
                return hub.push(FilePath(folder), repo_id, **options) if first else None

    def load_adapter(
        self,
        directory: str | FilePath,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        rngs: Any = None,
        autocast_adapter_dtype: bool = True,
        torch_generation: str | None = None,
        base_dtype: npt.DTypeLike | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Adds the adapter stored in a PEFT directory, in our or in PEFT's own variants.

        Args:
          directory: or the id of a hub repository, at `revision`; the adapter at its root, or in
            its `subfolder`.
          is_trainable: its numbers are trained on; else they are frozen like the base, as in PEFT.
            Frozen in any case are weights that the file has and nothing in its configuration
            trains: an adapted output head's own, and embeddings of a resized vocabulary.
          rngs: as for `add_adapter`: what adapter dropout draws from, in nnx.
          autocast_adapter_dtype: as for `add_adapter`; False rounds what the file holds.
          torch_generation: for a file without bases (``save_projection=False``), the draw of the
            torch release it was trained under, such as "bf16-8bit" (``docs/torch-generations.md``).
          base_dtype: for such a file, the dtype that the base model was loaded in for training,
            which PEFT gives the bases; by default the one recorded, else this model's.

        Raises:
          AdapterFileError: the files are damaged, incomplete or hold non-finite numbers.
          ConfigError: the name is taken, or no adapter can have it; `torch_generation` or
            `base_dtype` is unknown, or given for a file that has its bases.
          TargetError: the adapter's layers and this model's do not fit together.
        """
        self._check_new(adapter_name, rngs)
        check_flag("is_trainable", is_trainable)
        check_flag("autocast_adapter_dtype", autocast_adapter_dtype)
        folder = hub.local_directory(directory, revision, subfolder)
        store = self._store
        found = files.restore(
            self._registry,
            store.base_leaves(),
            folder,
            adapter_name,
            torch_generation,
            base_dtype,
        )
        if not is_trainable:
            config = dataclasses.replace(found.config, inference_mode=True)
            found = found._replace(config=config)
        self._add(store, found, is_trainable, rngs, autocast_adapter_dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        directory: str | FilePath,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        apply: Apply = "auto",
        token_axes: Sequence[str] = (),
        rngs: Any = None,
        views: Mapping[str, str] | None = None,
        names: Rules | None = None,
        layer_types: Table | None = None,
        optional: Sequence[str] = (),
        sample_inputs: Any = None,
        autocast_adapter_dtype: bool = True,
        torch_generation: str | None = None,
        base_dtype: npt.DTypeLike | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Any:
        """Wraps `model` with the adapter stored in `directory`.

        Args:
          model: as for `get_peft_model`.
          directory, adapter_name, is_trainable: as for `load_adapter`.
          apply, token_axes, rngs, views, names, layer_types, optional, sample_inputs: as for
            `get_peft_model`.
          autocast_adapter_dtype, torch_generation, base_dtype, revision, subfolder: as for
            `load_adapter`.

        Returns:
          the wrapped model, as `get_peft_model`.

        Raises:
          RandLoraError: as `get_peft_model` and `load_adapter`.
        """
        rules = WrapRules.stated(
            apply, token_axes, views, names, layer_types, optional, sample_inputs
        )
        wrapped = cast(RandLoraModel, wrap(model, rules))
        with given_back(wrapped):
            wrapped.load_adapter(
                directory,
                adapter_name,
                is_trainable,
                rngs=rngs,
                autocast_adapter_dtype=autocast_adapter_dtype,
                torch_generation=torch_generation,
                base_dtype=base_dtype,
                revision=revision,
                subfolder=subfolder,
            )
        return wrapped


def _torch_delta(update: Update) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return update.formed().swapaxes(-1, -2)
