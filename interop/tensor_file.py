"""Open safetensors files: the ``safetensors`` package reads the header, we read the numbers.

Numbers are read by position and not through the package, which maps the file: what was read of it
counts as the process's memory, all of an adapter's copies of its bases, and a file that is cut
short meanwhile ends the process. An adapter repeats its bases under every layer, so one tensor is
compared with others without holding both. Of two tensors of one name the package keeps the last;
here they are refused, as is any header, in words that name the file, the tensor and the offset.
``docs/design.md`` has the measurements.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from errno import ENOENT
from functools import partial
from io import BufferedWriter
from math import prod
from os import fstat
from os.path import samestat
from pathlib import Path
from typing import NoReturn

import numpy as np
from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.strict_json import parse_object
from randlora_jax.interop.tensor_format import DTYPES, header_fault
from safetensors import SafetensorError, safe_open

MAX_HEADER = 100_000_000  # the format's own limit
CHUNK = 1 << 20  # bytes; fits the processor's cache, so comparing costs little over reading
PIECE = 1 << 18  # bytes; of an array that is written or looked through
BLOCK = 1 << 24  # bytes; what one thread reads in one go, long enough for a disk
THREADS = 2  # that compare; reading lets go of Python's lock

Slice = tuple[str, str, tuple[int, ...]]  # name, the format's name of the dtype, shape


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
        view = bytes_of(array)
        for at in range(0, tensor.nbytes, BLOCK):
            piece = view[at : at + BLOCK]
            self._fill(piece, tensor.start + at, tensor.key)
            self.advance(len(piece))
        return array

    def rows(self, tensor: Tensor, start: int, stop: int) -> np.ndarray:
        """The numbers of some rows of a tensor, from `start` to before `stop`."""
        width = tensor.nbytes // tensor.shape[0]
        shape = (stop - start, *tensor.shape[1:])
        place = tensor.start + start * width
        return self.read(replace(tensor, shape=shape, start=place, nbytes=width * (stop - start)))

    def copy(self, tensor: Tensor, target: BufferedWriter) -> None:
        """Write the bytes of one tensor to an open file. Memory: one block, or none."""
        at, end = tensor.start, tensor.start + tensor.nbytes
        target.flush()
        with suppress(AttributeError, OSError):  # no such call on this system or filesystem
            while at < end:
                done = os.copy_file_range(
                    self._file.fileno(), target.fileno(), min(BLOCK, end - at), offset_src=at
                )
                if not done:
                    break
                at += done
        target.seek(0, os.SEEK_END)
        while at < end:
            block = bytearray(min(BLOCK, end - at))
            self._fill(memoryview(block), at, tensor.key)
            target.write(block)
            at += len(block)

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
        expected = bytes_of(array)
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
        raw = self._header_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"its header is not UTF-8: {error.reason} at byte {8 + error.start}")
        header = parse_object(text, f"{self.path}: header")  # refuses a name that is given twice
        slices, metadata, refusal = self._as_the_package_reads_it()
        fault = header_fault(header, 8 + len(raw), self.size) or refusal
        if fault:
            self.fail(fault)
        tensors, start = {}, 8 + len(raw)
        for key, code, shape in slices:
            tensor = Tensor(key, code, shape, start, prod(shape) * DTYPES[code].itemsize)
            tensors[key], start = tensor, start + tensor.nbytes
        return tensors, metadata

    def _as_the_package_reads_it(self) -> tuple[list[Slice], dict[str, str], str]:
        """The tensors in the order of their bytes, the metadata, and an error or ""."""
        try:
            with safe_open(self.path, framework="numpy") as opened:
                keys = opened.offset_keys()
                slices = [opened.get_slice(key) for key in keys]
                shapes = [(x.get_dtype(), tuple(x.get_shape())) for x in slices]
                metadata = opened.metadata() or {}
        except SafetensorError as error:
            return [], {}, f"no safetensors file ({error}); copy it again"
        if not samestat(fstat(self._file.fileno()), self.path.stat()):
            raise FileNotFoundError(ENOENT, "it was replaced while it was opened", str(self.path))
        return [(key, *shape) for key, shape in zip(keys, shapes, strict=True)], metadata, ""

    def _header_bytes(self) -> bytearray:
        if self.size < 8:
            self.fail(f"{self.size} bytes cannot be a safetensors file; copy it again")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "header length")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, self.size - 8):
            self.fail(
                f"its header claims {length} bytes; the file has {self.size} and the format "
                f"allows {MAX_HEADER}. It is truncated or no safetensors file; copy it again"
            )
        raw = bytearray(length)
        self._fill(memoryview(raw), 8, "header")
        return raw


def pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """A contiguous array's items in order, a quarter of a megabyte at a time."""
    items = np.ascontiguousarray(array).reshape(-1)
    step = PIECE // array.dtype.itemsize
    return (items[at : at + step] for at in range(0, items.size, step))


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, which are not copied."""
    return array.reshape(-1).view(np.uint8).data
