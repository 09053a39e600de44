"""PEFT's adapter directories: adapter_config.json and adapter_model.safetensors.

Read: every variant that PEFT has written, with the shared bases at the top level, again under
every layer, under one layer, or nowhere. Written: one copy of the bases, under the first adapted
layer. There alone every reader finds it, PEFT's and transformers' alike; at the top level
transformers' own loader does not look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from os import fstat
from os.path import samestat
from pathlib import Path
from typing import NoReturn

import ml_dtypes
import numpy as np
from randlora_jax.interop import promises
from randlora_jax.interop.adapter import (
    BASE_DTYPES,
    Adapter,
    Provenance,
    StoredPair,
    bases_digest,
    check,
    check_finite,
    derived_key,
)
from randlora_jax.interop.adapter_name import saving_folder
from randlora_jax.interop.atomic import Replaced, current_file, replacing_files
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError, listed, shown
from randlora_jax.interop.keys import BASE_PARTS, LAYER_PARTS, PREFIX, Role, roles_of
from randlora_jax.interop.progress import Progress, silent
from randlora_jax.interop.strict_json import parse_object
from randlora_jax.interop.tensor_file import Tensor, TensorFile, pieces
from randlora_jax.interop.tensor_writer import write_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
METADATA_KEY = "randlora_jax"


def read_adapter(directory: str | Path) -> Adapter:
    """Read one adapter, checking that every tensor is accounted for, sound and finite.

    lambda and gamma stored in float16 or bfloat16 are widened to float32. All copies of the
    bases are compared bit for bit. Nothing is known of the base model: it counts as having all
    that the config names (see `promises.check`). Memory: one copy of the bases, and the trained
    numbers.

    Raises:
      AdapterFileError: files are missing, damaged, contradictory or of another method; the
        message names the file, the key, what was expected and what to do.
    """
    return promises.check(read_files(directory), directory, None)


def read_files(directory: str | Path, progress: Progress = silent) -> Adapter:
    """As `read_adapter`, for those who know the base model and call `promises.check` with it.

    Raises:
      AdapterFileError: as `read_adapter`.
    """
    config, file = open_adapter(directory)
    with file, progress("reading adapter", file.size) as file.advance:
        adapter = load_adapter(config, file)
        check_finite(adapter, file.path)
    return adapter


def write_adapter(
    directory: str | Path,
    adapter: Adapter,
    *,
    confirm: Callable[[], object] = lambda: None,
    allow: Callable[[Replaced], object] = lambda replaced: None,
) -> None:
    """Write an adapter so that every PEFT reader opens it, with one copy of the bases.

    Both files appear together: a reader finds the adapter that was there before or this one,
    never a mix, wherever the process is killed (see `atomic`). Other files of the directory
    stay. Bases of float32 that bfloat16 holds without loss are written so; they are left out
    where ``config.save_projection`` is False. Where the provenance says that PyTorch did not
    draw them, `derived_key` replaces the key in adapter_config.json.

    Args:
      directory: made if missing.
      adapter: float32 lambda and gamma; nothing is cast.
      confirm: called when all is written and nothing in place yet; if it raises, all stays as it
        was.
      allow: the last to be asked, as `replacing_files` does.

    Raises:
      AdapterFileError: the adapter is unsound, holds NaN or infinity or what its config does not
        name, or `directory` is a file.
      ConfigError: the bases can neither be written nor drawn again by a reader.
    """
    folder = saving_folder(directory)
    check(adapter, folder)
    check_finite(adapter, folder)
    config, provenance = adapter.config, adapter.provenance
    bases = _bases_to_write(adapter, folder)
    metadata = {"format": "pt"}
    if provenance is not None:
        _check_digest(adapter, folder)
        if not provenance.source.startswith("torch"):
            config = replace(config, projection_prng_key=derived_key(provenance.digest))
        metadata[METADATA_KEY] = provenance.to_json()

    arrays, dtypes = _file_tensors(adapter, bases)
    _check_readable(config, arrays, folder)
    with replacing_files(folder, entry=CONFIG_NAME, allow=allow) as staged:
        config.save_pretrained(staged)
        write_tensors(staged / WEIGHTS_NAME, arrays, metadata, dtypes)
        confirm()


def open_adapter(directory: str | Path) -> tuple[RandLoraConfig, TensorFile]:
    """Both files of one save, though another process may be replacing them right now.

    For callers that need more of the file than `read_adapter` gives, such as its size.

    Raises:
      AdapterFileError: as `read_adapter`; of the tensors, only the header was read.
    """
    folder = Path(directory)
    for attempt in range(10):
        config_path, weights_path = (
            current_file(folder, name, entry=CONFIG_NAME) for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
        try:
            with open(config_path, "rb") as opened:
                file = TensorFile(weights_path)
                try:
                    now = current_file(folder, CONFIG_NAME, entry=CONFIG_NAME).stat()
                    if samestat(fstat(opened.fileno()), now):
                        return _parse_config(opened.read(), config_path), file
                except BaseException:
                    file.close()
                    raise
                file.close()
        except FileNotFoundError:
            if attempt == 9:
                raise _missing(folder) from None
        except OSError as error:
            raise AdapterFileError(f"{folder}: cannot be read ({error.strerror})") from error
    raise AdapterFileError(f"{folder}: kept changing while it was read; wait for the other writer")


def _missing(folder: Path) -> AdapterFileError:
    if not folder.is_dir():
        return AdapterFileError(f"{folder}: expected an adapter directory, found none")
    if (folder / PICKLE_NAME).exists() and not (folder / WEIGHTS_NAME).exists():
        return AdapterFileError(
            f"{folder / PICKLE_NAME}: a pickle, which can run any program when it is loaded, so "
            "it is not. If you trust its author, convert it where PyTorch is installed:\n"
            f'cd "{folder.resolve()}" && python -c "import torch, safetensors.torch as s; '
            f"t = torch.load('{PICKLE_NAME}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.clone() for k, v in t.items()}}, '{WEIGHTS_NAME}', "
            "{'format': 'pt'})\""
        )
    absent = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).exists()]
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; it has adapters in subfolders, open one of them: {listed(inside)}" if inside else ""
    return AdapterFileError(
        f"{folder}: expected {CONFIG_NAME} and {WEIGHTS_NAME}, found no {' and no '.join(absent)}"
        f"{hint or '; name the directory that save_pretrained wrote, or copy it again'}"
    )


def _parse_config(raw: bytes, path: Path) -> RandLoraConfig:
    try:
        return RandLoraConfig.from_dict(parse_object(raw.decode(), str(path)))
    except (ConfigError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path}: {error}") from error


def load_adapter(config: RandLoraConfig, file: TensorFile) -> Adapter:
    """Read and check all tensors, as `read_adapter` does, but for NaN and infinity.

    What only the base model tells is not asked; `promises.check` does it.

    Raises:
      AdapterFileError: as `read_adapter`.
    """
    adapter, compare_copies = load_once(config, file)
    compare_copies()
    return adapter


def load_once(config: RandLoraConfig, file: TensorFile) -> tuple[Adapter, Callable[[], None]]:
    """As `load_adapter`, but with second copies still unread; calling the second reads them.

    Copies are nearly all of some files, and a caller may have something to do meanwhile.
    """
    roles = roles_of(file.tensors.values(), config, file.fail)
    content = _read_each_once(file, roles)
    a, b = (content.arrays.get(Role(part, "")) for part in BASE_PARTS)
    bases = None if a is None or b is None else (a, b)
    if bases and not config.save_projection:
        file.fail(
            f"{shown(content.places[Role('A', '')].key)}: expected no bases, since {CONFIG_NAME} "
            "has save_projection false and PEFT would ignore them; set it to true to use them"
        )
    if not bases:
        config = replace(config, projection_source="torch")  # PEFT draws them from the key
    text = file.metadata.get(METADATA_KEY)
    layers = _layers(content.arrays)
    adapter = Adapter(
        config=promises.settled_config(config, layers, file.path),
        layers=layers,
        saved={role.name: x for role, x in content.arrays.items() if role.part == "saved"},
        bases=bases,
        provenance=Provenance.from_json(text, f"{file.path}: {METADATA_KEY}") if text else None,
    )
    check(adapter, file.path)
    _check_provenance(adapter, file.path)
    return adapter, partial(_compare_copies, file, content)


@dataclass
class _Content:
    """What a file holds, each tensor read once however often it is there.

    Attributes:
      arrays: by what they are.
      places: where in the file each was read.
      copies: where the same should be again.
    """

    arrays: dict[Role, np.ndarray] = field(default_factory=dict)
    places: dict[Role, Tensor] = field(default_factory=dict)
    copies: dict[Role, list[Tensor]] = field(default_factory=dict)


def _read_each_once(file: TensorFile, roles: Mapping[str, Role]) -> _Content:
    content = _Content()
    for key, tensor in file.tensors.items():
        part, role = roles[key].part, _kept(roles[key])
        if part in LAYER_PARTS + BASE_PARTS and tensor.dtype not in BASE_DTYPES:
            file.fail(
                f"{shown(key)}: expected F32, F16 or BF16, found {tensor}; save it again in one "
                "of them"
            )
        if part == "repeated" or role in content.arrays:
            content.copies.setdefault(role, []).append(tensor)
        else:
            content.arrays[role], content.places[role] = file.read(tensor), tensor
    return content


def _compare_copies(file: TensorFile, content: _Content) -> None:
    for role, copies in content.copies.items():
        other = file.unlike(copies, content.arrays[role])
        if other is not None:
            one = content.places[role]
            file.fail(
                f"{shown(one.key)} ({one}) and {shown(other.key)} ({other}) should be copies of "
                "one tensor and differ: readers would disagree about what the adapter computes"
            )


def _layers(arrays: Mapping[Role, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``{layer: (lambda, gamma)}``, in float32."""
    names = [role.name for role in arrays if role.part == "lambda"]
    lams, gammas = (
        [arrays[Role(part, name)].astype(np.float32, copy=False) for name in names]
        for part in LAYER_PARTS
    )
    return dict(zip(names, zip(lams, gammas, strict=True), strict=True))


def _kept(role: Role) -> Role:
    """The role of the one copy that is kept of what a file may hold more than once."""
    if role.part in BASE_PARTS:
        return Role(role.part, "")
    return Role("saved", role.name) if role.part == "repeated" else role


def _check_provenance(adapter: Adapter, where: Path) -> None:
    """Check that bases, metadata and config come from one save."""
    provenance = adapter.provenance
    if provenance is None:
        return
    _check_digest(adapter, where)
    key, by_torch = adapter.config.projection_prng_key, provenance.source.startswith("torch")
    expected = provenance.projection_prng_key if by_torch else derived_key(provenance.digest)
    if key != expected:
        raise AdapterFileError(
            f"{where}: expected projection_prng_key {expected} in {CONFIG_NAME} beside it, found "
            f"{key}: the two files do not belong together; fetch both again"
        )
    if adapter.bases is None and not by_torch:
        raise AdapterFileError(
            f"{where}: expected bases in the file, since PyTorch cannot draw those that its "
            f"metadata records of {shown(provenance.source)}; found none: it lost them. Fetch it "
            "again"
        )


def _check_digest(adapter: Adapter, where: Path) -> None:
    if adapter.provenance is None or adapter.bases is None:
        return
    found = bases_digest(*adapter.bases)
    if found != adapter.provenance.digest:
        raise AdapterFileError(
            f"{where}: expected bases of digest {shown(adapter.provenance.digest)}, found {found}: "
            "they were changed or damaged; fetch the file again"
        )


def _bases_to_write(adapter: Adapter, where: Path) -> StoredPair | None:
    provenance = adapter.provenance
    if adapter.config.save_projection:
        if adapter.bases is None:
            raise ConfigError(
                f"{where}: save_projection is True and the adapter has no bases. Draw them "
                "first, or set save_projection=False if they are PyTorch's own for the key"
            )
        return adapter.bases
    if provenance is not None and not provenance.source.startswith("torch"):
        raise ConfigError(
            f"{where}: save_projection is False, and only PyTorch's own bases can be drawn again "
            f"by a reader; these are from {provenance.source!r}. Set save_projection=True"
        )
    return None


def _file_tensors(
    adapter: Adapter, bases: StoredPair | None
) -> tuple[dict[str, np.ndarray], dict[str, np.dtype]]:
    """What to write by the file's keys, and the dtypes that are not the arrays' own."""
    arrays = {PREFIX + key: array for key, array in adapter.saved.items()}
    for name, (lam, gamma) in adapter.layers.items():
        arrays[f"{PREFIX}{name}.randlora_lambda"] = lam
        arrays[f"{PREFIX}{name}.randlora_gamma"] = gamma
    dtypes: dict[str, np.dtype] = {}
    if bases is not None:
        first = min(adapter.layers, key=_natural)
        for part, array in zip(BASE_PARTS, bases, strict=True):
            key = f"{PREFIX}{first}.randlora_{part}"
            arrays[key], dtypes[key] = array, narrowest(array)
    return arrays, dtypes


def _check_readable(config: RandLoraConfig, arrays: Mapping[str, np.ndarray], where: Path) -> None:
    """Hold what is to be written against the reader's own rules of keys and targets."""

    def fail(message: str) -> NoReturn:
        raise AdapterFileError(f"{where}: nothing is written that could not be read: {message}")

    tensors = [Tensor(key, "", x.shape, 0, x.nbytes) for key, x in arrays.items()]
    roles = roles_of(tensors, config, fail)
    layers = {role.name for role in roles.values() if role.part == "lambda"}
    promises.settled_config(config, layers, where)


def narrowest(array: np.ndarray) -> np.dtype:
    """bfloat16 where it holds a float32 array without loss: its lower half is zero throughout."""
    if array.dtype == np.float32 and not any(
        (piece.view(np.uint32) & 0xFFFF).any() for piece in pieces(array)
    ):
        return np.dtype(ml_dtypes.bfloat16)
    return array.dtype


def _natural(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]
