"""Ways to damage an adapter directory, for the fuzz harness.

A mutation takes a random source and the files of a sound adapter and changes them. It says whether
the result must be refused, or whether it may be harmless: then what is read must be what the
safetensors package and a JSON parser read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import ml_dtypes
import numpy as np
from randlora_jax.interop.tensor_format import DTYPES
from safetensors.numpy import save

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass
class Files:
    """What lies in a directory, and which keys the damage concerns."""

    config: bytes
    weights: bytes
    others: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # one of them must be in the message, if there are any

    def copy(self) -> Files:
        return replace(self, others=dict(self.others))

    @property
    def size(self) -> int:
        return sum(map(len, (self.config, self.weights, *self.others.values())))


Mutation = Callable[[Random, Files], bool]  # True: must be refused
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def junk(rng: Random) -> object:
    """A JSON value that should not be there, or not so."""
    big = 10 ** rng.choice([3, 9, 10, 19, 40, 400])
    return rng.choice(
        [
            None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**32, 2**63, 2**64 - 1,
            2**64, -(2**63), -(2**63) - 1, big, -big, float("nan"), float("inf"), "", "0", "x",
            "..", "../../x", "/etc/passwd", "\0", "\u202e", "\ud800", "x" * 10**4, "(", "a{99999}",
            "all-linear", [], [0], [None], ["x"], [[]], {}, {"x": 1}, {"": {}}, [-1, 2**70],
            ["x"] * 999, rng.randrange(100), rng.random(),
        ]
    )  # fmt: skip


# --- bytes ----------------------------------------------------------------------------------------


def _header_length(files: Files) -> int:
    return struct.unpack("<Q", files.weights[:8])[0]


TOKENS = [b"0", b"9", b"-1", b"[", b"]", b"{", b"}", b",", b":", b'"', b"F16", b"F64", b"A", b"."]
TOKENS += [b"\\u0000", b"null", b"1e9", b"NaN", b"\xff", b"\0", b"..", b"randlora_", b"99999999999"]


def _spliced(rng: Random, raw: bytes, within: int) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(within), rng.choice([0, 1, 1, 4, 30])
        data[at : at + size] = rng.choice(TOKENS)
    return bytes(data)


@mutation
def header_spliced(rng: Random, files: Files) -> bool:
    end = 8 + _header_length(files)
    if rng.random() < 0.3:
        files.weights = _spliced(rng, files.weights, end)
    else:
        header = _spliced(rng, files.weights[8:end], end - 8)
        files.weights = packed(header, files.weights[end:])
    return False


@mutation
def bits_flipped(rng: Random, files: Files) -> bool:
    data = bytearray(files.weights)
    for _ in range(rng.choice([1, 1, 1, 5, 50])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files.weights = bytes(data)
    return False


@mutation
def cut_short(rng: Random, files: Files) -> bool:
    where = rng.choice([rng.randrange(8), rng.randrange(200), len(files.weights) - 1])
    files.weights = files.weights[: rng.choice([where, rng.randrange(len(files.weights))])]
    return True


@mutation
def appended(rng: Random, files: Files) -> bool:
    files.weights += rng.choice([b"\0", b" " * 8, files.weights, rng.randbytes(100)])
    return True


@mutation
def another_length(rng: Random, files: Files) -> bool:
    right, size = _header_length(files), len(files.weights)
    far = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**8, 10**8 + 1, size, size - 8]
    length = rng.choice([*far, right + rng.choice([-8, -1, 1, 8]), rng.randrange(2**64)])
    files.weights = struct.pack("<Q", length % 2**64) + files.weights[8:]
    return length != right


@mutation
def noise(rng: Random, files: Files) -> bool:
    files.weights = rng.randbytes(rng.choice([0, 7, 8, 9, 100, 5000]))
    return True


# --- the header -----------------------------------------------------------------------------------


def header_of(files: Files) -> tuple[dict, bytes]:
    end = 8 + _header_length(files)
    return json.loads(files.weights[8:end]), files.weights[end:]


def packed(header: dict | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _some_key(rng: Random, keys) -> str:
    return rng.choice(sorted(key for key in keys if key != "__metadata__"))


@mutation
def entry_field(rng: Random, files: Files) -> bool:
    """A dtype, shape or data_offsets of junk, or none."""
    header, data = header_of(files)
    key = _some_key(rng, header)
    name = rng.choice(["dtype", "shape", "data_offsets"])
    before = header[key].pop(name)
    if rng.random() < 0.9:
        value = junk(rng)
        header[key][name] = value if rng.random() < 0.5 else [value, value]
    files.weights = packed(header, data)
    return header[key].get(name) != before


@mutation
def absurd_shape(rng: Random, files: Files) -> bool:
    """Huge sides, whose product may overflow to what the offsets say."""
    header, data = header_of(files)
    key = _some_key(rng, header)
    sides = [0, 1, 2, 3, 2**16, 2**31, 2**32, 2**33, 2**62, 2**63, 2**64, 10**30, -1, -(2**63)]
    header[key]["shape"] = [rng.choice(sides) for _ in range(rng.choice([1, 2, 3, 4, 40]))]
    if rng.random() < 0.5:
        start = header[key]["data_offsets"][0]
        header[key]["data_offsets"] = [start, start + rng.choice(sides)]
    files.weights = packed(header, data)
    return False


@mutation
def moved_offsets(rng: Random, files: Files) -> bool:
    """Tensors that overlap, leave holes or reach beyond the end."""
    header, data = header_of(files)
    entry = header[_some_key(rng, header)]
    by = rng.choice([-8, -4, -1, 1, 4, 8, len(data), -len(data)])
    entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
    files.weights = packed(header, data)
    return True


@mutation
def swapped_entries(rng: Random, files: Files) -> bool:
    """Two tensors with each other's bytes."""
    header, data = header_of(files)
    one, two = _some_key(rng, header), _some_key(rng, header)
    header[one], header[two] = header[two], header[one]
    files.weights = packed(header, data)
    return False


@mutation
def one_name_twice(rng: Random, files: Files) -> bool:
    header, data = header_of(files)
    key = _some_key(rng, header)
    text = json.dumps(header).encode()
    again = json.dumps({key: header[key]}).encode()
    files.weights = packed(text[:-1] + b"," + again[1:], data)
    files.names = (key,)
    return True


@mutation
def reshaped(rng: Random, files: Files) -> bool:
    header, data = header_of(files)
    entry = header[_some_key(rng, header)]
    rng.shuffle(entry["shape"])
    if rng.random() < 0.5:
        entry["shape"].insert(rng.randint(0, len(entry["shape"])), 1)
    files.weights = packed(header, data)
    return False


@mutation
def other_metadata(rng: Random, files: Files) -> bool:
    header, data = header_of(files)
    ours = header.get("__metadata__", {}).get("randlora_jax")
    if ours is None or rng.random() < 0.3:
        header["__metadata__"] = rng.choice([junk(rng), {"randlora_jax": junk(rng)}])
    else:
        values = json.loads(ours)
        values[rng.choice([*values, "new"])] = junk(rng)
        header["__metadata__"]["randlora_jax"] = json.dumps(values)
    files.weights = packed(header, data)
    return False


@mutation
def deep_json(rng: Random, files: Files) -> bool:
    depth = rng.choice([10, 1000, 10**5])
    text = rng.choice(
        [b"[" * depth, b'{"a":' * depth, b'{"a":' + b"[" * depth + b"]" * depth + b"}"]
    )
    if rng.random() < 0.5:
        files.config = text
    else:
        files.weights = packed(text, header_of(files)[1])
    return True


@mutation
def wide_json(rng: Random, files: Files) -> bool:
    """Text that takes much more memory once it is parsed."""
    many = ",".join(rng.choice(["[]", "{}", "0.5", '"x"']) for _ in range(2 * 10**4))
    header, data = header_of(files)
    if rng.random() < 0.5:
        files.config = f'{{"x": [{many}], {files.config.decode().lstrip()[1:]}'.encode()
    else:
        header[_some_key(rng, header)]["shape"] = json.loads(f"[{many}]")
        files.weights = packed(header, data)
    return files.config.startswith(b"{\n")


# --- tensors --------------------------------------------------------------------------------------


def _tensors(files: Files) -> dict[str, np.ndarray]:
    header, data = header_of(files)
    header.pop("__metadata__", None)
    found = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        array = np.frombuffer(data[start:end], DTYPES[entry["dtype"]])
        found[key] = array.reshape(entry["shape"])
    return found


def _repack(files: Files, tensors: dict[str, np.ndarray], *, keep_metadata: bool = True) -> None:
    metadata = header_of(files)[0].get("__metadata__") if keep_metadata else None
    files.weights = save(tensors, metadata)


@mutation
def not_finite(rng: Random, files: Files) -> bool:
    tensors = _tensors(files)
    key = _some_key(rng, [k for k, x in tensors.items() if x.dtype.kind not in "biu"])
    value = rng.choice([np.nan, np.inf, -np.inf])
    for other, x in tensors.items():  # copies stay copies
        if other == key or (key[-11:] in ("randlora_A", "randlora_B") and other[-11:] == key[-11:]):
            changed = x.copy()
            changed.reshape(-1)[rng.randrange(x.size)] = value
            tensors[other] = changed
    _repack(files, tensors, keep_metadata=rng.random() < 0.5)
    return True


@mutation
def other_dtype(rng: Random, files: Files) -> bool:
    tensors = _tensors(files)
    key = _some_key(rng, tensors)
    dtypes = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_]
    dtype = np.dtype(rng.choice(dtypes))
    tensors[key] = tensors[key].astype(dtype)
    _repack(files, tensors, keep_metadata=rng.random() < 0.5)
    files.names = () if "randlora" not in key else (key,)
    return "randlora_" in key and (dtype.kind in "bi" or dtype == np.float64)


@mutation
def other_extents(rng: Random, files: Files) -> bool:
    """A tensor that is cut, doubled or transposed."""
    tensors = _tensors(files)
    key = _some_key(rng, [k for k, x in tensors.items() if x.ndim])
    x = tensors[key]
    axis = rng.randrange(x.ndim)
    change = rng.choice(
        [
            lambda: x.take(range(x.shape[axis] - 1), axis),
            lambda: np.concatenate([x, x], axis),
            lambda: x.T.copy(),
            lambda: x[None],
            lambda: x.reshape(-1),
        ]
    )
    tensors[key] = np.ascontiguousarray(change())
    _repack(files, tensors, keep_metadata=rng.random() < 0.5)
    return False


@mutation
def copies_disagree(rng: Random, files: Files) -> bool:
    """A second copy of the bases, like the first but for one bit."""
    tensors = _tensors(files)
    found = [key for key in tensors if key.split(".default")[0].endswith("randlora_B")]
    if not found:
        return False
    key = rng.choice(found)
    copy = tensors[key].copy()
    raw = copy.reshape(-1).view(np.uint8)
    raw[rng.randrange(raw.size)] ^= 1 << rng.randrange(8)
    top = "base_model.randlora_"
    if len(found) == 1:
        tensors[f"{top}A"] = tensors[key.replace("randlora_B", "randlora_A")]
        key = f"{top}B"
    tensors[key] = copy
    _repack(files, tensors, keep_metadata=rng.random() < 0.5)
    return True


@mutation
def absent_tensor(rng: Random, files: Files) -> bool:
    tensors = _tensors(files)
    key = _some_key(rng, tensors)
    del tensors[key]
    _repack(files, tensors)
    return "randlora_" in key


NAMES = [
    "", ".", "..", "/", "../x", "..\\x", "/etc/passwd", "C:\\x", "x\0", "x\n", "\u202ex", "ключ",
    "x" * 10**5, "\U0001f511", "base_model", "base_model.", "base_model.model", "base_model.model.",
    "randlora_A", "__metadata", "base_model.randlora_C", "base_model.randlora_lambda",
    "base_model.model.randlora_lambda", "base_model.model...randlora_A",
    "base_model.model.../../x.randlora_lambda", "base_model.model.x.randlora_A.y.z",
    "base_model.model.x.randlora_lambda.randlora_lambda", "base_model.model.x.lora_A",
    "base_model.model.../x.bias", "base_model.model.x..bias",
]  # fmt: skip


@mutation
def surplus_tensor(rng: Random, files: Files) -> bool:
    tensors = _tensors(files)
    key = rng.choice(NAMES)
    size = rng.choice([(), (0,), (1,), (2, 3), (3, 1, 5)])
    tensors[key] = np.ones(size, rng.choice([np.float32, np.int8]))
    _repack(files, tensors)
    return True


@mutation
def renamed_tensor(rng: Random, files: Files) -> bool:
    header, data = header_of(files)
    key = _some_key(rng, header)
    header[rng.choice(NAMES)] = header.pop(key)
    files.weights = packed(header, data)
    return True


@mutation
def renamed_layer(rng: Random, files: Files) -> bool:
    """A whole layer under a name that leads elsewhere."""
    header, data = header_of(files)
    layer = _some_key(rng, [key for key in header if "randlora_lambda" in key]).split(".randlora_")[
        0
    ]
    name = rng.choice([*NAMES, "layer.2/../3", "layer.99", "head"])
    header = {key.replace(layer + ".", f"{PREFIX}{name}."): entry for key, entry in header.items()}
    files.weights = packed(header, data)
    return False
