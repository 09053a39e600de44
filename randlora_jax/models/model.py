"""RandLoraModel: what an adapted model can do, whichever framework holds its arrays.

The story: choose layers (`targets`), size and draw the bases (`bases`), give each chosen layer its
lambda and gamma (`life`), and hand them to a front end (`linen`, `nnx`), which puts them where its
framework finds them.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.bases import Bases, used_box
from randlora_jax.core.cost import Apply, explained
from randlora_jax.core.delta import Term, delta
from randlora_jax.core.kernel_layout import Views
from randlora_jax.core.layers import How, Layer
from randlora_jax.core.mesh import alone_among_processes
from randlora_jax.interop import hub
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.peft_dir import write_adapter
from randlora_jax.interop.strict_json import write_text
from randlora_jax.models import files, known_models
from randlora_jax.models.layer_types import Table
from randlora_jax.models.life import Life
from randlora_jax.models.names import Names, Rules


class RandLoraModel(Life):
    """A base model with RandLoRA adapters; made by `get_peft_model` or `from_pretrained`.

    Names and meaning follow PEFT's ``RandLoraModel`` and ``PeftModel``; `Life` has what happens to
    its adapters.
    """

    # Looking and counting.

    def delta_weights(self, adapter_name: str = "default") -> dict[str, np.ndarray]:
        """delta_W of every adapted layer by canonical name, (out, in) float32, scaling included.

        A stack that no names rule names has one entry, (*stack, out, in).
        """
        spec, state = self._spec(adapter_name), self._state(adapter_name)
        bases = self._pair(spec.identity, self._extents(spec, state))
        found: dict[str, np.ndarray] = {}
        for name, (lam, gamma) in state.layers.items():
            layer = self._book.layers[name]
            n_in, n_out = layer.matrix
            form = partial(_torch_delta, bases, spec.scaling, n_in, n_out)
            for _ in layer.stack:
                form = jax.vmap(form)
            found |= layer.split(np.asarray(form(lam, gamma)))
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

    def explain(self, tokens: int, adapter_name: str = "default") -> str:
        """Which way each pass of each layer takes and what it costs (`randlora_jax.core.cost`).

        One line for each size of layer, as it runs without dropout and in its kernel's precision.

        Args:
          tokens: rows of a layer's input on one device: batch times length.
        """
        spec, state, base = self._spec(adapter_name), self._state(adapter_name), self._base_leaves()
        apply = self._book.how.apply
        groups: dict[tuple[int, int, bool], list[Layer]] = {}
        for name in state.layers:
            layer = self._book.layers[name]
            low = jnp.finfo(base[layer.kernel_path].dtype).bits < 32
            joins = not low or apply == "merged"
            groups.setdefault((*layer.matrix, joins), []).append(layer)
        lines = []
        for (n_in, n_out, joins), layers in groups.items():
            flat = used_box((n_in, n_out), spec.identity.r).n * spec.identity.r
            names = layers[0].name + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
            lines.append(explained(names, tokens, n_in, n_out, flat, joins, apply))
        return "\n".join(lines)

    # Files.

    def save_pretrained(self, directory: str | FilePath) -> None:
        """Writes PEFT adapter directories: "default" at the root, others in folders of their name.

        Each is written atomically and holds one copy of its bases, of the extents PEFT expects. Of
        several processes (``jax.distributed``) all call this, and the first one writes.

        Warns where PEFT could not open all of them in one PyTorch model.

        Raises:
          RandLoraError: something cannot be written as PEFT reads it; nothing was written.
        """
        states = {name: self._state(name).on_host() for name in self._book.specs}
        with alone_among_processes("save_pretrained") as first:
            if not first:
                return
            adapters = {name: files.export(self._book, name, s) for name, s in states.items()}
            files.warn_if_apart(adapters)
            for name, adapter in adapters.items():
                folder = FilePath(directory) / ("" if name == "default" else name)
                write_adapter(folder, adapter)
                card = folder / hub.CARD_NAME
                if not card.exists():  # the user's own words stay
                    numbers = states[name].size()
                    write_text(card, hub.model_card(adapter.config, len(adapter.layers), numbers))

    def push_to_hub(self, repo_id: str, **options: Any) -> str | None:
        """Saves to the Hugging Face hub, in one commit; see `interop.hub.push` for the options.

        Of several processes all call this, and the first one pushes.

        Returns:
          the address of the commit; None in the other processes.
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
        torch_generation: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Adds the adapter stored in a PEFT directory, in our or in PEFT's own variants.

        Args:
          directory: or the id of a hub repository, at `revision`.
          torch_generation: for a file without bases (``save_projection=False``), the draw of the
            torch release it was trained under, such as "bf16-8bit" (``docs/torch-generations.md``).

        Raises:
          AdapterFileError: the files are damaged, incomplete or hold non-finite numbers.
          TargetError: the adapter's layers and this model's do not fit together.
        """
        folder = hub.local_directory(directory, revision)
        spec, config, state, stored = files.restore(
            self._book, self._base_leaves(), folder, adapter_name, torch_generation
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
        token_axes: Sequence[str] = (),
        rngs: Any = None,
        views: Mapping[str, str] | None = None,
        names: Rules | None = None,
        layer_types: Table | None = None,
        torch_generation: str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Wraps `model` with the adapter stored in `directory`.

        Args:
          model: as for `get_peft_model`.
          is_trainable: the adapter's numbers are trained on; else they are frozen like the base.
          apply, token_axes, rngs, views, names, layer_types: as for `get_peft_model`.
          torch_generation, revision: as for `load_adapter`.
        """
        wrapped = wrap(model, How(apply, tuple(token_axes)), views, names, layer_types)
        wrapped.load_adapter(
            directory,
            adapter_name,
            is_trainable,
            rngs=rngs,
            torch_generation=torch_generation,
            revision=revision,
        )
        return wrapped  # type: ignore[return-value]


def _torch_delta(
    bases: Bases, scaling: float, n_in: int, n_out: int, lam: jax.Array, gamma: jax.Array
) -> jax.Array:
    return delta(Term(lam, gamma, bases, scaling), n_in, n_out).T


def wrap(
    model: Any,
    how: How,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
) -> RandLoraModel:
    """The front end for `model`, with no adapter yet.

    Raises:
      ConfigError: `model` is of no kind that a front end knows, `apply` no way to apply, or its
        mesh has no such `token_axes`.
    """
    if how.apply not in ("auto", "factored", "merged"):
        raise ConfigError(f"apply={how.apply!r}: expected 'auto', 'factored' or 'merged'")
    wrapped = _wrapped(model, how, views, names, layer_types)
    mesh = wrapped._book.replicated
    if not set(how.token_axes) <= set(mesh.mesh.axis_names if mesh else ()):
        raise ConfigError(
            f"token_axes={how.token_axes}: the base model lies on "
            f"{f'a mesh with the axes {mesh.mesh.axis_names}' if mesh else 'no mesh'}; put its "
            "arrays on the mesh first (jax.device_put with a NamedSharding), then wrap it"
        )
    return wrapped


def _wrapped(
    model: Any,
    how: How,
    views: Mapping[str, str] | None,
    names: Rules | None,
    layer_types: Table | None,
) -> RandLoraModel:
    import flax.linen
    import flax.nnx

    from randlora_jax.front_ends.linen import HuggingFaceRandLora, LinenRandLora
    from randlora_jax.front_ends.nnx import NnxRandLora
    from randlora_jax.front_ends.pytree import PytreeRandLora

    stated = Views(views or {}), Names(names or {}), layer_types or {}
    if isinstance(model, flax.nnx.Module):
        known = known_models.about(model)
        return NnxRandLora(
            model,
            how,
            Views({**(views or {}), **known.views}),
            Names({**(names or {}), **known.names}),
            {**(layer_types or {}), **known.layer_types},
            known.origin,
        )
    if isinstance(model, flax.linen.Module):
        return LinenRandLora(model, how, *stated)
    if isinstance(getattr(model, "module", None), flax.linen.Module):
        return HuggingFaceRandLora(model, how, *stated)
    if views and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model)):
        return PytreeRandLora(model, how, *stated[:2])
    raise ConfigError(
        f"cannot wrap a {type(model).__name__}: expected a flax.nnx.Module, a flax.linen module "
        "bound to its variables (module.bind(variables)), a Hugging Face Flax model, or a pytree "
        "of arrays with views= of its kernels"
    )


def get_peft_model(
    model: Any,
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    token_axes: Sequence[str] = (),
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
) -> RandLoraModel:
    """Wraps `model` with a fresh RandLoRA adapter; before training it computes what `model` does.

    Args:
      model: a ``flax.nnx.Module`` (its layers are replaced in place, as PEFT does), a
        ``flax.linen`` module bound to its variables, a Hugging Face ``FlaxPreTrainedModel``, or,
        of any other library, a pytree of arrays with the `views` of its kernels.
      config: what to adapt and how.
      apply: how layers apply the adapter: "auto" takes the cheapest exact way for each pass of each
        layer (`RandLoraModel.explain` says which), "factored" and "merged" insist on one. Belongs
        to the run and is never saved.
      token_axes: the mesh axes that split a batch's first axis, where a trace cannot see it
        (automatic axes): what is cheapest depends on the tokens of one device, and each device
        then sums its own tokens' gradient of lambda and gamma (`randlora_jax.core.mesh`).
      rngs: an ``nnx.Rngs`` or a jax key, for ``init_weights=False`` and, in nnx, adapter dropout.
      views: kernel layouts that types do not tell, by regular expressions on layer paths, such as
        ``{"layers/mlp/.*": "s i o"}`` for scanned Dense layers (`randlora_jax.core.kernel_layout`).
      names: rules from module paths to PyTorch's, where they differ (`models.names.Names`).
      layer_types: types of layers that this library does not know (`models.layer_types`).

    Raises:
      ConfigError: `model` or `config` cannot be used.
      TargetError: `config` selects no layer of `model`.
    """
    wrapped = wrap(model, How(apply, tuple(token_axes)), views, names, layer_types)
    wrapped.add_adapter(adapter_name, config, rngs=rngs)
    return wrapped
