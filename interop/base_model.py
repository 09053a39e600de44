"""A Hugging Face model directory, as config.json and the headers of its safetensors files tell.

An adapter names its layers as the PyTorch class did that was trained (``bert.encoder.layer.0...``),
a checkpoint as the class did that was saved, which may have lacked the head and with it the prefix
(``encoder.layer.0...``), or had both where the adapter's class had neither. `BaseModel.fit` finds
the one way in which the two agree, or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.errors import AdapterFileError, TargetError, nearest, shown
from randlora_jax.interop.strict_json import read_object
from randlora_jax.interop.tensor_file import Tensor, TensorFile

MODEL_CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)))

# The model types whose linear layers of these names are Conv1D, with weights (in, out). All else
# in transformers is Linear, with weights (out, in); GPT-Neo's c_fc, for example.
CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
CONV1D_NAMES = {"c_attn", "q_attn", "c_fc", "c_proj"}

# What layers are called that make a language model's logits, where they have no tensor of their own
# because they use the embedding's.
LM_HEADS = {"lm_head", "decoder", "proj_out", "embed_out", "output_projection", "lm_loss"}


@dataclass(frozen=True)
class Naming:
    """From an adapter's names to a checkpoint's: drop the prefix `strip`, or put `add` before."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        """`name` as the checkpoint has it."""
        return self.add + name.removeprefix(self.strip)


@dataclass(frozen=True)
class BaseLayer:
    """One adapted layer of the base model.

    Attributes:
      name: as the adapter calls it.
      key: of its weight in the checkpoint, or of the embedding whose weight it uses.
      tensor: that weight's place and size.
      conv1d: the weight is (in, out) rather than (out, in).
    """

    name: str
    key: str
    tensor: Tensor
    conv1d: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.tensor.shape
        return (columns, rows) if self.conv1d else (rows, columns)


class BaseModel:
    """An open model directory; nothing but headers is read until `read` is called.

    Attributes:
      folder: the directory.
      config: config.json.
      files: ``{name: open safetensors file}``.
      home: ``{key: name of the file that has it}``, in the order of files and bytes.
      naming: how an adapter's names become its keys; settled by `fit`.

    Raises:
      AdapterFileError: the directory is no complete safetensors checkpoint.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = Path(directory)
        self.files: dict[str, TensorFile] = {}
        self.home: dict[str, str] = {}
        self.naming = Naming()
        self.config = read_object(self.folder / MODEL_CONFIG, finite=False)
        try:
            for name in _file_names(self.folder):
                self._open(name)
        except BaseException:
            self.close()
            raise
        # transformers renames these when it loads a checkpoint from before PyTorch
        self._keys = {re.sub(r"LayerNorm\.(gamma|beta)$", _modern, key): key for key in self.home}

    def __enter__(self) -> BaseModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    def tensor(self, key: str) -> Tensor:
        """The place and size of a tensor by its key in the checkpoint."""
        return self.files[self.home[key]].tensors[key]

    def read(self, key: str) -> np.ndarray:
        """The numbers of a tensor by its key in the checkpoint."""
        return self.files[self.home[key]].read(self.tensor(key))

    # Names.

    def fit(self, names: Iterable[str]) -> Naming:
        """Settle how an adapter's names become the checkpoint's; `find` and `layer` follow it.

        The names as they are come first, then less a first part of theirs, then with a first part
        of the checkpoint's before them, whichever finds most layers.

        Raises:
          TargetError: two ways find as many.
        """
        names = list(names)
        scores = dict.fromkeys(self._namings(names), 0)
        for naming in scores:
            self.naming = naming
            scores[naming] = sum(self.find(f"{name}.weight") is not None for name in names)
        most = max(scores.values())
        best = [naming for naming, score in scores.items() if score == most]
        if len(best) > 1 and best[0] != Naming():
            example = names[0]
            raise TargetError(
                f"{self.folder}: layer {shown(example)} could be "
                f"{' or '.join(shown(naming(example)) for naming in best)}. Give the directory of "
                "the very model that was adapted, saved with save_pretrained"
            )
        self.naming = best[0]
        return self.naming

    def _namings(self, names: list[str]) -> list[Naming]:
        ours = dict.fromkeys(name.split(".", 1)[0] + "." for name in names if "." in name)
        theirs = dict.fromkeys(key.split(".", 1)[0] + "." for key in self._keys if "." in key)
        return [Naming(), *(Naming(strip=p) for p in ours), *(Naming(add=p) for p in theirs)]

    def find(self, key: str) -> str | None:
        """The checkpoint's key for a state-dict key of the adapted model; None if it has none."""
        return self._keys.get(self.naming(key)) or self._keys.get(key)

    def layer(self, name: str) -> BaseLayer:
        """The linear layer that an adapter calls `name`.

        Raises:
          TargetError: the checkpoint has no such layer, or its weight is not a matrix of floats.
        """
        key = self.find(f"{name}.weight") or self._embedding_of(name)
        if key is None:
            expected = f"{self.naming(name)}.weight"
            weights = [key for key in self._keys if key.endswith(".weight")]
            raise TargetError(
                f"{self.folder} has no tensor {shown(expected)}, with another prefix or without; "
                f"it has {nearest(expected, weights)}. Is it the base model of this adapter, with "
                "its head?"
            )
        tensor = self.tensor(key)
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            raise TargetError(
                f"{self.folder}: {shown(key)}: expected a matrix of floating point numbers, found "
                f"{tensor}. A quantised model has to be dequantised first"
            )
        return BaseLayer(name, key, tensor, self._is_conv1d(name))

    def layers(self, adapter: Adapter) -> dict[str, BaseLayer]:
        """Every layer of `adapter`, its numbers checked against the base model's shapes.

        Raises:
          TargetError: a layer is missing or of another size, or it is unclear which side of its
            weight is in.
        """
        self.fit(adapter.layers)
        found = {name: self.layer(name) for name in adapter.layers}
        names = {layer.key: name for name, layer in found.items()}
        for name, layer in found.items():
            if names[layer.key] != name:
                raise TargetError(
                    f"{self.folder}: {shown(layer.key)} is the weight of both {shown(name)} and "
                    f"{shown(names[layer.key])}: another base model"
                )
        recorded = adapter.provenance.shapes if adapter.provenance else {}
        for name, layer in found.items():
            smallest = adapter.layers[name][1].shape[1]
            if min(layer.shape) != smallest or recorded.get(name, layer.shape) != layer.shape:
                raise TargetError(
                    f"{self.folder}: layer {shown(name)} has (out, in) = {layer.shape}; the "
                    "adapter was trained on "
                    f"{recorded.get(name, f'one whose smaller side is {smallest}')}: another base "
                    "model"
                )
        if adapter.config.fan_in_fan_out and not any(layer.conv1d for layer in found.values()):
            raise TargetError(
                f"{self.folder}: the adapter says that weights are stored (in, out), and no layer "
                f"of model type {self.config.get('model_type')!r} is known to be. Which side is in "
                "cannot be told from a square weight: merge in PyTorch, with PEFT's "
                "merge_and_unload, or set fan_in_fan_out to false if all its layers are Linear"
            )
        return found

    def _is_conv1d(self, name: str) -> bool:
        config, parts = self.config, name.split(".")
        for part in parts:  # an encoder-decoder has one configuration for each
            inner = config.get(part)
            config = inner if isinstance(inner, dict) and "model_type" in inner else config
        return str(config.get("model_type")) in CONV1D_TYPES and parts[-1] in CONV1D_NAMES

    # Tied weights.

    def tied(self, key: str) -> str | None:
        """What shares its weight with the tensor at state-dict key `key`; None for nothing.

        transformers lets a language model's input embedding and its output layer share one tensor
        unless config.json says ``"tie_word_embeddings": false``.
        """
        module, _, leaf = key.rpartition(".")
        mine = self.find(key)
        if mine is None:
            return self._embedding_of(module) if leaf == "weight" else None
        if mine not in self._vocabulary:
            return None
        others = [other for other in self._vocabulary if other != mine]
        if not others:  # a checkpoint without the other side: it is this one
            return "the model's other vocabulary matrix"
        same = [other for other in others if self._equal(mine, other)]
        # Copies that differ, and no word of tying: the class does not tie, or they would not.
        return same[0] if same else others[0] if "tie_word_embeddings" in self._text else None

    def _embedding_of(self, name: str) -> str | None:
        """The embedding whose weight the output layer `name` uses, having none of its own."""
        return next(iter(self._vocabulary), None) if name.split(".")[-1] in LM_HEADS else None

    @cached_property
    def _vocabulary(self) -> list[str]:
        """The matrices with a row for each token, none inside numbered layers; if they are tied."""
        rows = self._text.get("vocab_size", self.config.get("vocab_size"))
        if not self._text.get("tie_word_embeddings", self.config.get("tie_word_embeddings", True)):
            return []
        return [
            key
            for key in self.home
            if not any(part.isdecimal() for part in key.split("."))
            and key.endswith(".weight")
            and len(self.tensor(key).shape) == 2
            and self.tensor(key).shape[0] == rows
        ]

    @property
    def _text(self) -> Mapping[str, Any]:
        """The configuration of the language model, which may be one part of several."""
        inner = (self.config.get(part) for part in ("text_config", "decoder", "llm_config"))
        return next((part for part in inner if isinstance(part, dict)), self.config)

    def _equal(self, one: str, other: str) -> bool:
        return self.files[self.home[other]].holds(self.tensor(other), self.read(one))

    # Opening.

    def _open(self, name: str) -> None:
        try:
            file = self.files[name] = TensorFile(self.folder / name)
        except OSError as error:
            raise AdapterFileError(
                f"{self.folder / name}: cannot be read ({error.strerror})"
            ) from error
        for key in file.tensors:
            if key in self.home:
                file.fail(f"{shown(key)} is in {self.home[key]} as well; remove one")
            self.home[key] = name


def base_shapes(directory: str | Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """``{name: (out, in)}`` of linear layers of a Hugging Face model, from its files' headers.

    Args:
      directory: with config.json and one or several safetensors files.
      names: PyTorch module paths, such as an adapter's layers.

    Raises:
      AdapterFileError: no complete safetensors checkpoint.
      TargetError: a layer is not in it, or could be one of several.
    """
    names = list(names)
    with BaseModel(directory) as base:
        base.fit(names)
        return {name: base.layer(name).shape for name in names}


def _file_names(folder: Path) -> list[str]:
    """The safetensors files of a model, as its index lists them."""
    if (folder / INDEX).exists():
        places = read_object(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise AdapterFileError(f"{folder / INDEX}: expected a weight_map, found none")
        for name in places.values():
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise AdapterFileError(
                    f"{folder / INDEX}: expected names of files beside it, found {shown(name)}"
                )
        return sorted(set(places.values()))
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    raise AdapterFileError(
        f"{folder}: expected {SINGLE} or {INDEX}, found neither"
        + (f" but {pickled[0]}: load it in PyTorch and save_pretrained it" if pickled else "")
    )


def _modern(match: re.Match[str]) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]
