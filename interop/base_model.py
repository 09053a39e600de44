"""A Hugging Face model directory, as config.json and the headers of its safetensors files tell."""

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
from randlora_jax.interop.checkpoint_files import refuse_quantised, weight_files
from randlora_jax.interop.checkpoint_names import CheckpointNames, spelling
from randlora_jax.interop.conv1d import is_conv1d
from randlora_jax.interop.errors import TargetError, nearest, shown
from randlora_jax.interop.expert_stacks import StoredMatrix, expert_matrices
from randlora_jax.interop.keys import file_key, trained_tensors
from randlora_jax.interop.strict_json import read_object
from randlora_jax.interop.tensor_file import Tensor, TensorFile

MODEL_CONFIG = "config.json"
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)))

# What layers are called that make a language model's logits, where they have no tensor of their own
# because they use the embedding's.
LM_HEADS = {
    *("lm_head", "decoder", "proj_out", "embed_out", "output_projection", "lm_loss"),
    *("vocab_projector", "generator_lm_head"),
}
# What embeddings are called whose rows are no tokens, but may be as many.
_NO_TOKENS = re.compile(r"pos|wpe|type")

# The embedding that encoder and decoder have in common, by the names of T5, BART and their kin, and
# the places that use it. (A decoder alone, as OPT's, calls its own by the last name.)
_SHARED = re.compile(r"(^|\.)(shared|encoder\.embed_tokens)$")
_USES_SHARED = re.compile(r"(^|\.)(shared|(encoder|decoder)\.embed_tokens)$")

# The language model's part of config.json, in models that have others.
_TEXT_PARTS = (
    "text_config",
    "decoder",
    "llm_config",
    "language_config",
    "vlm_config",
    "thinker_config",
)


@dataclass(frozen=True)
class BaseLayer:
    """One adapted layer of the base model.

    Attributes:
      name: as the adapter calls it.
      stored: where its weight is: a tensor, of an embedding whose weight it uses too, or in one.
      tensor: that tensor's place and size.
      conv1d: it is a Conv1D in PyTorch, whose weight is (in, out) rather than (out, in).
    """

    name: str
    stored: StoredMatrix
    tensor: Tensor
    conv1d: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored.shape
        return (columns, rows) if self.stored.transposed else (rows, columns)

    @property
    def torch_shape(self) -> tuple[int, int]:
        """Of its weight in PyTorch."""
        return self.shape[::-1] if self.conv1d else self.shape


class BaseModel:
    """An open model directory; nothing but headers is read until `read` is called.

    Attributes:
      folder: the directory.
      config: config.json.
      files: ``{name: open safetensors file}``, those that transformers loads.
      index: the name of the file that lists them; None for a single file.
      home: ``{key: name of the file that has it}``, in the order of files and bytes.
      in_stacks: ``{key: StoredMatrix}`` of single experts that have no tensor of their own.
      names: how an adapter's names become its keys; settled by `layers`.

    Raises:
      AdapterFileError: the directory is no complete safetensors checkpoint, or a quantised one.
    """

    def __init__(self, directory: str | Path) -> None:
        self.folder = Path(directory)
        self.files: dict[str, TensorFile] = {}
        self.home: dict[str, str] = {}
        self.config = read_object(self.folder / MODEL_CONFIG, finite=False)
        refuse_quantised(self.folder, self.config)
        found = weight_files(self.folder, self.config)
        self.index = found.index
        try:
            for name in found.names:
                try:
                    self._open(name)
                except OSError as error:
                    found.fail_to_open(name, error)
            found.check_complete(self.home)
        except BaseException:
            self.close()
            raise
        self.in_stacks = expert_matrices(self._shapes, self.config)
        self.names = CheckpointNames([*self.home, *self.in_stacks], self.folder)

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

    # Layers.

    def find(self, key: str) -> str | None:
        """As `CheckpointNames.find`; a key of a tensor, or one of `in_stacks`."""
        return self.names.find(key)

    def layer(self, name: str) -> BaseLayer:
        """The linear layer that an adapter calls `name`.

        Raises:
          TargetError: the checkpoint has no such layer, its weight is not a matrix of floats, or
            which side of it is in cannot be told.
        """
        key = self.find(f"{name}.weight") or self._embedding_of(name)
        if key is None:
            raise self._missing(name)
        part = self.in_stacks.get(key)
        tensor = self.tensor(part.key if part else key)
        if not (part or len(tensor.shape) == 2) or tensor.dtype not in FLOATS:
            raise TargetError(
                f"{self.folder}: {shown(key)}: expected a matrix of floating point numbers, found "
                f"{tensor}. A quantised model has to be dequantised first"
            )
        if part:
            return BaseLayer(name, part, tensor, conv1d=False)
        conv1d = is_conv1d(key, self._shapes, self.config)
        if conv1d is None:
            raise self._undecided(name)
        rows, columns = tensor.shape
        return BaseLayer(name, StoredMatrix(key, (rows, columns), conv1d), tensor, conv1d)

    def _missing(self, name: str) -> TargetError:
        single = re.match(r"(.*\.experts\.)\d+\.", name)
        stacks = [key for key in self.home if single and spelling(single[1]) in spelling(key)]
        stacks = [key for key in stacks if len(self.tensor(key).shape) == 3]
        if stacks and not self.in_stacks:
            return TargetError(
                f"{self.folder}: the adapter changes single experts, such as {shown(name)}, and "
                f"the checkpoint has all of a layer's in one tensor, {shown(stacks[0])} "
                f"({self.tensor(stacks[0])}). Where each lies in it is not known of model type "
                f"{self.config.get('model_type')!r}. Save the base model with its experts apart, "
                "as transformers 5 does too unless save_original_format is False"
            )
        expected = f"{name}.weight"
        weights = [key for key in (*self.home, *self.in_stacks) if key.endswith(".weight")]
        return TargetError(
            f"{self.folder} has no tensor {shown(expected)}, with another prefix or without; it "
            f"has {nearest(expected, weights)}. Is it the base model of this adapter, with its "
            "head?"
        )

    def _undecided(self, name: str) -> TargetError:
        return TargetError(
            f"{self.folder}: layer {shown(name)}: the adapter or the checkpoint says that weights "
            "are stored (in, out), and no layer of model type "
            f"{self.config.get('model_type')!r} is known to be. Which side is in cannot be told "
            "from a square weight: merge in PyTorch, with PEFT's merge_and_unload, or set "
            "fan_in_fan_out to false if all its layers are Linear"
        )

    def layers(self, adapter: Adapter) -> dict[str, BaseLayer]:
        """Every layer of `adapter`, its numbers checked against the base model's shapes.

        Raises:
          TargetError: a layer is missing or of another size, also by what else of it the adapter
            carries, or it is unclear which side of its weight is in.
        """
        self.names.fit(adapter.layers)
        found = {name: self.layer(name) for name in adapter.layers}
        names = {layer.stored: name for name, layer in found.items()}
        for name, layer in found.items():
            if names[layer.stored] != name:
                raise TargetError(
                    f"{self.folder}: {shown(layer.stored.key)} is the weight of both {shown(name)} "
                    f"and {shown(names[layer.stored])}: another base model"
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
        self._check_carried(adapter, found)
        if adapter.config.fan_in_fan_out and not any(layer.conv1d for layer in found.values()):
            square = (name for name, layer in found.items() if len(set(layer.shape)) == 1)
            raise self._undecided(next(square, next(iter(found))))
        return found

    def _check_carried(self, adapter: Adapter, found: Mapping[str, BaseLayer]) -> None:
        """Hold the layers against what the file has besides: gamma tells their smaller side alone.

        PEFT writes the weight of an adapted output head (a resized vocabulary is why), the biases
        it trains, and embeddings, which have a row for each of that head's outputs.
        """
        for name, layer in found.items():
            for leaf, shape in (("weight", layer.torch_shape), ("bias", layer.shape[:1])):
                carried = adapter.saved.get(file_key(f"{name}.{leaf}", [name]))
                if carried is not None and carried.shape != shape:
                    raise self.resized(f"{name}.{leaf}", list(shape), carried.shape)
        rows = {layer.shape[0] for name, layer in found.items() if name.split(".")[-1] in LM_HEADS}
        for key, value in trained_tensors(adapter.saved).items() if rows else ():
            place = self.find(key)
            here = self.tensor(place).shape if place in self.home else ()
            if len(here) == 2 and here != value.shape and here[0] in rows:
                raise self.resized(key, list(here), value.shape)

    def resized(self, key: str, here: object, carried: tuple[int, ...]) -> TargetError:
        """The error of a tensor that has another shape in the adapter than in the base model."""
        return TargetError(
            f"{self.folder}: {shown(key)} is {here}, and the adapter carries {list(carried)} in "
            "its place. Resize the base model as it was for training (its labels, its vocabulary), "
            "save it and give that directory"
        )

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self.tensor(key).shape for key in self.home}

    # Tied weights.

    def tied(self, key: str, *, has_head: bool = True) -> str | None:
        """What shares its weight with the tensor at state-dict key `key`; None for nothing.

        transformers lets a language model's input embedding and its output layer share one tensor,
        and so the embeddings of an encoder and a decoder, unless config.json says
        ``"tie_word_embeddings": false``.

        Args:
          has_head: whether the adapted model has an output layer; a classifier has none.
        """
        module, _, leaf = key.rpartition(".")
        mine = self.find(key)
        if mine is None:
            return self._embedding_of(module) if leaf == "weight" else None
        if mine not in self._vocabulary:
            return None
        others = [other for other in self._vocabulary if other != mine]
        if not has_head:
            others = [other for other in others if _USES_SHARED.search(_module(other))]
        if not others:  # a checkpoint without the other side, if there is one
            if _SHARED.search(module):
                return "the embeddings of encoder and decoder"
            return "the output layer" if has_head else None
        same = [other for other in others if self._equal(mine, other)]
        # Copies that differ, and no word of tying: the class does not tie, or they would not.
        return same[0] if same else others[0] if self._says_tied(None) else None

    def _embedding_of(self, name: str) -> str | None:
        """The embedding whose weight the layer `name` uses, having none of its own."""
        uses = name.split(".")[-1] in LM_HEADS or _USES_SHARED.search(name)
        return next(iter(self._vocabulary), None) if uses else None

    @cached_property
    def _vocabulary(self) -> list[str]:
        """The matrices with a row for each token, none inside numbered layers; if they are tied."""
        rows = self._text.get("vocab_size", self.config.get("vocab_size"))
        if not self._says_tied(True):
            return []
        return [
            key
            for key in self.home
            if not any(part.isdecimal() for part in key.split("."))
            and key.endswith(".weight")
            and not _NO_TOKENS.search(_module(key).rpartition(".")[2])
            and len(self.tensor(key).shape) == 2
            and self.tensor(key).shape[0] == rows
        ]

    def _says_tied(self, otherwise: bool | None) -> bool | None:
        """What config.json says of tying; `otherwise` where it says nothing that can be relied on.

        Of a model of several parts, transformers 4 asks the language model's, 5 the whole.
        """
        whole, part = (c.get("tie_word_embeddings") for c in (self.config, self._text))
        return otherwise if part is None else bool(part or whole)

    @cached_property
    def _text(self) -> Mapping[str, Any]:
        """The configuration of the language model, which may be a part of a part."""
        found: Mapping[str, Any] = self.config
        while parts := [found[name] for name in _TEXT_PARTS if isinstance(found.get(name), dict)]:
            found = parts[0]
        return found

    def _equal(self, one: str, other: str) -> bool:
        return self.files[self.home[other]].holds(self.tensor(other), self.read(one))

    # Opening.

    def _open(self, name: str) -> None:
        file = self.files[name] = TensorFile(self.folder / name)
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
        base.names.fit(names)
        return {name: base.layer(name).shape for name in names}


def _module(key: str) -> str:
    return key.rpartition(".")[0]
