"""Which files of a Hugging Face model directory hold its weights: those that transformers loads.

transformers takes the file that config.json names (``transformers_weights``), else
``model.safetensors``, else what ``model.safetensors.index.json`` lists; a directory may hold the
rests of an earlier save besides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from randlora_jax.interop.errors import AdapterFileError, listed, shown
from randlora_jax.interop.strict_json import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Other formats, and the argument of from_pretrained in transformers 4 that reads them.
_OTHERS = {
    "pytorch_model*.bin": "",
    "flax_model*.msgpack": "from_flax=True",
    "tf_model*.h5": "from_tf=True",
    "*.gguf": "gguf_file=...",
}

# Where a quantised model says so: in config.json, and in files of its own from before that.
_QUANTISED = ("quantization_config", "compression_config")
_QUANTISED_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint.

    Attributes:
      folder: that they lie in.
      names: of the files, sorted.
      index: the name of the index that lists them; None for a single file.
      places: ``{key: file}``, as the index has it.
    """

    folder: Path
    names: list[str]
    index: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)

    def check_complete(self, home: Mapping[str, str]) -> None:
        """Hold the index against what the files have: ``{key: file}``.

        Raises:
          AdapterFileError: they differ.
        """
        if self.index is None:
            return
        for key, name in self.places.items():
            if home.get(key) != name:
                found = f"it is in {home[key]}" if key in home else "it is not there"
                self._fail(f"{shown(key)} should be in {name}, and {found}")
        beyond = sorted(home.keys() - self.places.keys())
        if beyond:
            self._fail(f"its files hold {listed(beyond, 3)}, which it does not list")

    def fail_to_open(self, name: str, error: OSError) -> NoReturn:
        """Raise an error about a file that cannot be read."""
        listed_in = f"; {self.index} lists it, so the checkpoint is incomplete: copy it again"
        raise AdapterFileError(
            f"{self.folder / name}: cannot be read ({error.strerror})"
            + (listed_in if self.index else "")
        ) from error

    def _fail(self, message: str) -> NoReturn:
        raise AdapterFileError(
            f"{self.folder / str(self.index)}: the checkpoint is incomplete, or its index belongs "
            f"to another: {message}. Copy all of it again"
        )


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files that transformers loads from `folder`, whose config.json is `config`.

    Raises:
      AdapterFileError: there are none in safetensors, or the index lists none.
    """
    chosen = config.get("transformers_weights")
    if chosen is not None:
        _check_name(folder / "config.json", chosen)
        is_index = chosen.endswith(".safetensors.index.json")
        return _listed(folder, chosen) if is_index else WeightFiles(folder, [chosen])
    if (folder / SINGLE).is_file():
        return WeightFiles(folder, [SINGLE])
    if (folder / INDEX).is_file():
        return _listed(folder, INDEX)
    for name in (SINGLE, INDEX):
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise AdapterFileError(
                f"{folder / name}: a link to {os.readlink(folder / name)}, which is not there (the "
                "hub's cache may have been cleared): download the model again"
            )
    raise AdapterFileError(
        f"{folder}: expected {SINGLE} or {INDEX}, found neither{_instead(folder, config)}"
    )


def refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are stored quantised, by what is said of them.

    Raises:
      AdapterFileError: naming the method, and what to do.
    """
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    found = [part[name] for part in parts for name in _QUANTISED if part.get(name)]
    methods = [
        str(value.get("quant_method", "not named")) if isinstance(value, dict) else str(value)
        for value in found
    ] + [method for name, method in _QUANTISED_FILES.items() if (folder / name).exists()]
    if methods:
        raise AdapterFileError(
            f"{folder}: a quantised model (quant_method {shown(methods[0])}), and sums with its "
            "weights need their full numbers. Give the directory of the model that it was made "
            "from. Where there is none, some methods can be undone in PyTorch: load it, call "
            "model.dequantize() and save_pretrained to another directory"
        )


def _listed(folder: Path, index: str) -> WeightFiles:
    places = read_object(folder / index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise AdapterFileError(f"{folder / index}: expected a weight_map, found none")
    for name in places.values():
        _check_name(folder / index, name)
    return WeightFiles(folder, sorted(set(places.values())), index, places)


def _check_name(where: Path, name: object) -> None:
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise AdapterFileError(f"{where}: expected names of files beside it, found {shown(name)}")


def _instead(folder: Path, config: Mapping[str, Any]) -> str:
    """What to do with weights in another format, if there are any."""
    for pattern, argument in _OTHERS.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found and not argument:
            return f" but {found[0]}: load it in PyTorch and save_pretrained it"
        if found:
            classes = config.get("architectures")
            name = str(classes[0]) if isinstance(classes, list) and classes else "AutoModel"
            return (
                f" but {found[0]}: convert it where PyTorch and transformers 4 are installed, with "
                f"transformers.{name if name.isidentifier() else 'AutoModel'}.from_pretrained("
                f'"{folder}", {argument}).save_pretrained("converted")'
            )
    return ""
