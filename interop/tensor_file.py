"""The safetensors format: eight bytes of length, a JSON header, then the tensors' bytes.

Read and written here rather than through the ``safetensors`` package, because three things are
needed that it does not offer in every release we support: bf16 in NumPy (0.4 cannot), one
tensor compared with another without holding both (an adapter repeats its bases under every
layer), and errors that name the file, the tensor and the offset. Two tensors of one name, of
which the package keeps the last, are refused. Everything a file claims is checked against its
size before memory is asked for, and nothing is mapped: memory is what is read.
"""

from __future__ import annotations

import io
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.strict_json import parse_object

# The format's names, little-endian as the format is.
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # the format's own limit
MAX_RANK = 32  # NumPy 1's limit, far above any weight's
CHUNK = 1 << 20  # bytes; fits the processor's cache, so comparing costs little over reading
PIECE = 1 << 18  # bytes; of an array that is written or looked through
BLOCK = 1 << 24  # bytes; what one thread reads in one go, long enough for a disk
THREADS = 2  # that compare; reading lets go of Python's lock


@dataclass(frozen=True)
class Tensor:
    """Where one tensor of a file lies: ``start`` counts from the beginning of the file."""

    key: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        """NumPy's name for the dtype."""
        return DTYPES[self.code]

    def __str__(self) -> str:
        return f"{self.code} {list(self.shape)}"


class TensorFile:
    """An open safetensors file whose header was found to be sound.

    Attributes:
      path: the file.
      tensors: ``{key: Tensor}`` in the order of their bytes.
      metadata: the header's free strings.
      size: of the file, in bytes.
      advance: called with the number of bytes whenever some were read; for a progress bar.

    Raises:
      AdapterFileError: the file is truncated or its header is not what the format demands.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.advance: Callable[[int], object] = lambda nbytes: None
        self._lock = threading.Lock()
        self._file = io.FileIO(path)
        try:
            self.size = self._file.seek(0, 2)
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, tensor: Tensor) -> np.ndarray:
        """The numbers of one tensor, in the file's dtype."""
        array = np.empty(tensor.shape, tensor.dtype)
        view = _bytes_of(array)
        for at in range(0, tensor.nbytes, BLOCK):
            piece = view[at : at + BLOCK]
            self._fill(piece, tensor.start + at, tensor.key)
            self.advance(len(piece))
        return array

    def holds(self, tensor: Tensor, array: np.ndarray) -> bool:
        """Whether a tensor is bit for bit `array`."""
        return self.unlike([tensor], array) is None

    def unlike(self, copies: Sequence[Tensor], array: np.ndarray) -> Tensor | None:
        """One of `copies` that is not bit for bit `array`, None if all are.

        The copies are compared side by side, a block of each, so that `array` comes out of memory
        once and not once for every copy; this takes little longer than reading them. Memory: one
        small piece a thread.
        """
        for copy in copies:
            if (copy.shape, copy.dtype) != (array.shape, array.dtype):
                return copy
        expected = _bytes_of(array)
        blocks = [(copy, at) for at in range(0, array.nbytes, BLOCK) for copy in copies]
        pool = ThreadPoolExecutor(THREADS)
        try:
            same = pool.map(partial(self._holds_block, expected), blocks)
            for (copy, at), is_same in zip(blocks, same, strict=True):
                if not is_same:
                    return copy
                self.advance(min(BLOCK, array.nbytes - at))
        finally:
            pool.shutdown(cancel_futures=True)
        return None

    def _holds_block(self, expected: memoryview, block: tuple[Tensor, int]) -> bool:
        tensor, start = block
        found = bytearray(
            min(CHUNK, len(expected))
        )  # compares with memcmp, which a memoryview does not
        for at in range(start, min(start + BLOCK, len(expected)), CHUNK):
            piece = expected[at : min(at + CHUNK, start + BLOCK)]
            del found[len(piece) :]
            self._fill(memoryview(found), tensor.start + at, tensor.key)
            if found != piece:
                return False
        return True

    def fail(self, message: str) -> NoReturn:
        """Raise an error about this file."""
        raise AdapterFileError(f"{self.path}: {message}")

    def _fill(self, view: memoryview, start: int, what: str) -> None:
        while view:
            count = self._read_at(start, view)
            if not count:
                self.fail(f"{shown(what)}: the file ends inside it, {len(view)} bytes short")
            view, start = view[count:], start + count

    def _read_at(self, start: int, view: memoryview) -> int | None:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._lock:  # Windows: threads share one position
            self._file.seek(start)
            return self._file.readinto(view)

    def _read_header(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        if self.size < 8:
            self.fail(f"{self.size} bytes cannot be a safetensors file; copy it again")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, self.size - 8):
            self.fail(
                f"its header claims {length} bytes; the file has {self.size} and the format "
                f"allows {MAX_HEADER}. It is truncated or no safetensors file; copy it again"
            )
        raw = bytearray(length)
        self._fill(memoryview(raw), 8, "header")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"its header is not UTF-8: {error.reason} at byte {8 + error.start}")
        header = parse_object(text, f"{self.path}: header")
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            self.fail("__metadata__ in its header must map strings to strings")
        found = [self._tensor(key, entry, 8 + length) for key, entry in header.items()]
        found.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
        end = 8 + length
        for tensor in found:
            if tensor.start != end:
                self.fail(
                    f"{shown(tensor.key)}: its bytes begin at {tensor.start}, where the tensor "
                    f"before it ends at {end}: tensors may neither overlap nor leave holes"
                )
            end += tensor.nbytes
        if end != self.size:
            self.fail(
                f"its tensors end at byte {end}, the file at {self.size}: it is truncated or "
                "something was appended; copy it again"
            )
        return {tensor.key: tensor for tensor in found}, metadata

    def _tensor(self, key: str, entry: Any, base: int) -> Tensor:
        """Check one entry of the header against the file's size."""
        where = shown(key)
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            self.fail(f"{where}: its header entry needs dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            self.fail(f"{where}: dtype {shown(code)} is none of {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > MAX_RANK or max(shape, default=0) > self.size:
            self.fail(f"{where}: its shape is impossible in a file of {self.size} bytes")
        if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
            self.fail(f"{where}: data_offsets must be two increasing positions")
        nbytes = DTYPES[code].itemsize
        for size in shape:
            nbytes *= size
        if nbytes != offsets[1] - offsets[0] or base + offsets[1] > self.size:
            self.fail(
                f"{where}: {code} {shape} takes {nbytes} bytes; its offsets are {offsets} in a "
                f"file of {self.size} bytes"
            )
        return Tensor(key, code, tuple(shape), base + offsets[0], nbytes)


def write_tensors(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    metadata: dict[str, str],
    dtypes: Mapping[str, np.dtype] | None = None,
) -> None:
    """Write a new safetensors file, array by array, in small pieces.

    Larger items come first, so that every tensor is aligned to its item size; then by key.

    Args:
      dtypes: ``{key: dtype}`` of arrays that are written in another dtype than they have; it is
        for the caller to know that this loses nothing.

    Raises:
      AdapterFileError: an array's dtype has no name in the format.
    """
    written = {key: array.dtype for key, array in arrays.items()} | dict(dtypes or {})
    order = sorted(arrays, key=lambda key: (-written[key].itemsize, key))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in order:
        shape, dtype = arrays[key].shape, written[key]
        code = _CODES.get(dtype)
        if code is None:
            raise AdapterFileError(f"{path}: {key}: safetensors has no name for {dtype}")
        start, end = end, end + arrays[key].size * dtype.itemsize
        header[key] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            for piece in pieces(arrays[key]):
                file.write(_bytes_of(piece.astype(written[key], copy=False)))


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """A contiguous array's items in order, a quarter of a megabyte at a time."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = PIECE // array.dtype.itemsize
    return (flat[at : at + step] for at in range(0, flat.size, step))


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
