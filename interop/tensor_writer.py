"""Write a safetensors file tensor by tensor, each made when its turn comes.

(The ``safetensors`` package writes tensors that are all in memory.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import TypeAlias

import numpy as np
from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.progress import Advance, no_bar
from randlora_jax.interop.tensor_file import Tensor, TensorFile, bytes_of, pieces
from randlora_jax.interop.tensor_format import CODES, DTYPES


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: the format's name of its dtype, and its shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """NumPy's name for the dtype."""
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor of another file, to be taken over bit for bit."""

    file: TensorFile
    tensor: Tensor


Made: TypeAlias = np.ndarray | Stored | Iterator[np.ndarray]
"""A tensor's numbers, the tensor of another file that has them, or some rows after others."""


def write_stream(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    make: Callable[[str], Made],
    advance: Advance = no_bar,
) -> None:
    """Write a new file of `entries`, in their order, in small pieces. Memory: one tensor.

    Args:
      make: from a key to the numbers, of the entry's shape. Arrays are cast to the entry's dtype;
        it is for the caller to know that this loses nothing.
      advance: told the bytes of each tensor once it is written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, entry in entries.items():
        start, end = end, end + entry.nbytes
        shape = list(entry.shape)
        header[key] = {"dtype": entry.code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, entry in entries.items():
            _append(file, make(key), entry)
            advance(entry.nbytes)


def _append(file: BufferedWriter, made: Made, entry: Entry) -> None:
    if isinstance(made, Stored):
        made.file.copy(made.tensor, file)
        return
    for part in [made] if isinstance(made, np.ndarray) else made:
        for piece in pieces(part):
            file.write(bytes_of(piece.astype(entry.dtype, copy=False)))
            del piece  # or it lies beside the next, as would
        del part


def write_tensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, np.dtype] | None = None,
) -> None:
    """Write a new file of `arrays`.

    Larger items come first, so that every tensor is aligned to its item size; then by key.

    Args:
      dtypes: ``{key: dtype}`` of arrays that are written in another dtype than they have; it is
        for the caller to know that this loses nothing.

    Raises:
      AdapterFileError: an array's dtype has no name in the format.
    """
    written = {key: array.dtype for key, array in arrays.items()} | dict(dtypes or {})
    entries = {}
    for key in sorted(arrays, key=lambda key: (-written[key].itemsize, key)):
        if written[key] not in CODES:
            raise AdapterFileError(
                f"{path}: {shown(key)}: safetensors has no name for {written[key]}; cast it"
            )
        entries[key] = Entry(CODES[written[key]], arrays[key].shape)
    write_stream(path, entries, metadata, arrays.__getitem__)
