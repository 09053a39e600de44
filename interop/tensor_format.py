"""The safetensors format as NumPy holds it: its dtypes, and what is wrong with a header, in words.

The ``safetensors`` package refuses unsound headers, too, but says neither which tensor is at fault
nor where its bytes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from randlora_jax.interop.errors import shown

# The format's names, little-endian as the format is, of what NumPy can hold.
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
CODES: Mapping[np.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}

MAX_RANK = 32  # NumPy 1's limit, far above any weight's


def header_fault(header: Mapping[str, Any], base: int, size: int) -> str | None:
    """The first fault of a header; None where this finds none.

    Args:
      header: the JSON object.
      base: where the tensors' bytes begin in the file, from which their offsets count.
      size: of the file.
    """
    entries = dict(header)
    metadata = entries.pop("__metadata__", None)
    strings = metadata.values() if isinstance(metadata, dict) else (metadata or "",)
    if not all(isinstance(value, str) for value in strings) or isinstance(metadata, str):
        return "__metadata__ in its header must map strings to strings"
    for key, entry in entries.items():
        fault = _entry_fault(entry, base, size)
        if fault:
            return f"{shown(key)}: {fault}"
    end = base
    for (start, stop), key in sorted((entries[key]["data_offsets"], key) for key in entries):
        if base + start != end:
            return (
                f"{shown(key)}: its bytes begin at {base + start}, where the tensor before it ends "
                f"at {end}: tensors may neither overlap nor leave holes"
            )
        end = base + stop
    if end != size:
        return (
            f"its tensors end at byte {end}, the file at {size}: it is truncated or something was "
            "appended; copy it again"
        )
    return None


def _entry_fault(entry: Any, base: int, size: int) -> str | None:
    """What is wrong with one tensor's entry, by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its header entry needs dtype, shape and data_offsets"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        return (
            f"dtype {shown(code)} is none of {', '.join(DTYPES)}: store it as one of these, for "
            "instance by loading it in PyTorch and saving it again in BF16"
        )
    if not _are_sizes(shape) or len(shape) > MAX_RANK or max(shape, default=0) > size:
        return f"its shape is impossible in a file of {size} bytes"
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        return "data_offsets must be two increasing positions"
    nbytes = prod(shape) * DTYPES[code].itemsize
    if nbytes != offsets[1] - offsets[0]:
        return f"{code} {shape} takes {nbytes} bytes; its offsets are {offsets}"
    if base + offsets[1] > size:
        return (
            f"{code} {shape} takes {nbytes} bytes; its offsets are {offsets} in a file of {size} "
            f"bytes, and it ends at byte {base + offsets[1]}: the file is cut off; copy or "
            "download it again"
        )
    return None


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
