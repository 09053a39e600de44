"""Write a safetensors file tensor by tensor, each made when its turn comes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from randlora_jax.interop.tensor_file import DTYPES


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


def write_stream(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    make: Callable[[str], np.ndarray],
    advance: Callable[[int], object],
) -> None:
    """Write a new file of `entries`, in their order. Memory: one tensor.

    Args:
      make: from a key to the numbers, of the entry's dtype and shape.
      advance: told the bytes of each tensor once it is written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, entry in entries.items():
        start, end = end, end + entry.nbytes
        header[key] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, entry in entries.items():
            array = np.ascontiguousarray(make(key))
            assert (array.dtype, array.shape) == (entry.dtype, entry.shape), key
            file.write(array.reshape(-1).view(np.uint8).data)
            advance(entry.nbytes)
