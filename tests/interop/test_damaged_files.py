"""Every damaged adapter is refused by name: which file, which tensor, expected, found, do what."""

import json
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
P = "base_model.model."


def sound() -> Adapter:
    """Two layers, one trained module; small but with every kind of tensor."""
    ramp = np.linspace(-1, 1, 2 * 4 * 9).astype(np.float32)
    a, b = ramp[:10].reshape(2, 1, 5), ramp[:54].reshape(9, 3, 2)
    shapes = {"x.1": (5, 9), "x.2": (4, 3)}
    return Adapter(
        config=RandLoraConfig(
            r=2, target_modules=["1", "2"], modules_to_save=["head"], bias="randlora_only"
        ),
        layers={
            "x.1": (ramp[:6].reshape(2, 3), ramp[:15].reshape(3, 5)),
            "x.2": (ramp[:4].reshape(2, 2), ramp[:6].reshape(2, 3)),
        },
        saved={"head.weight": ramp[:6].reshape(2, 3), "x.1.base_layer.bias": ramp[:5]},
        bases=(a, b),
        provenance=Provenance("jax", 0, "dense", bases_digest(a, b), shapes),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path, sound())
    return tmp_path


def change_tensors(folder: Path, **changes) -> None:
    """Set tensors by key, or by key and a function; None removes. Our metadata goes."""
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(AdapterFileError, match=".*".join(map(re.escape, parts))):
        read_adapter(folder)


LAMBDA, GAMMA = f"{P}x.1.randlora_lambda", f"{P}x.1.randlora_gamma"
A, B = f"{P}x.1.randlora_A", f"{P}x.1.randlora_B"
TENSOR_DAMAGE = {
    "lambda without gamma": ({GAMMA: None}, (LAMBDA, "expected randlora_gamma beside it")),
    "gamma without lambda": ({LAMBDA: None}, (GAMMA, "expected randlora_lambda beside it")),
    "a lambda renamed": (
        {f"{P}x.I.randlora_lambda": np.ones((2, 3), np.float32), LAMBDA: None},
        (GAMMA, "expected randlora_lambda", "name was changed", f"{P}x.I.randlora_lambda"),
    ),
    "A without B": ({B: None}, (A, "expected randlora_B beside it")),
    "bases under a strange layer": (
        {f"{P}y.randlora_A": np.ones((2, 1, 5)), f"{P}y.randlora_B": np.ones((9, 3, 2))},
        (f"{P}y.randlora_A", "expected randlora_lambda and randlora_gamma beside it"),
    ),
    "another rank": ({LAMBDA: lambda x: x[:1]}, ("x.1.randlora_lambda", "(2, 3)", "(1, 3)")),
    "another n": ({GAMMA: lambda x: x[:2]}, ("x.1.randlora_gamma", "(3, 5)", "(2, 5)")),
    "another min": ({GAMMA: lambda x: x[:, :2]}, ("x.1.randlora_gamma", "(1, 2)", "(3, 2)")),
    "lambda a vector": ({LAMBDA: lambda x: x.ravel()}, ("x.1.randlora_lambda", "a matrix")),
    "lambda empty": ({LAMBDA: lambda x: x[:0]}, ("x.1.randlora_lambda", "a matrix", "(0, 3)")),
    "A too small": (
        {A: lambda x: x[:, :, :4], B: lambda x: x[:, :2]},
        ("randlora_A", "5 or more", "x.1", "(2, 1, 4)"),
    ),
    "A transposed": ({A: lambda x: x.T}, ("randlora_A", "(2, 1, MIN)", "(5, 1, 2)")),
    "B too short": ({B: lambda x: x[:4]}, ("randlora_B", "(5 or more, 3, 2)", "(4, 3, 2)")),
    "B with few bases": ({B: lambda x: x[:, :2]}, ("randlora_B", "(5 or more, 3, 2)")),
    "integers": ({GAMMA: lambda x: x.astype(np.int32)}, (GAMMA, "F32, F16 or BF16", "I32")),
    "float64": ({A: lambda x: x.astype(np.float64)}, (A, "F32, F16 or BF16", "F64 [2, 1, 5]")),
    "NaN": ({GAMMA: lambda x: x * np.nan}, ("x.1.randlora_gamma", "finite", "15 of 15")),
    "infinite f16": (
        {GAMMA: lambda x: np.full_like(x, np.inf, np.float16)},
        ("x.1.randlora_gamma", "finite"),
    ),
    "NaN in the bases": (
        {B: lambda x: np.where(x < 0, np.nan, x)},
        ("randlora_B", "finite", " of 54"),
    ),
    "NaN in a saved tensor": (
        {f"{P}head.weight": lambda x: np.where(x < 0, np.nan, x)},
        ("head.weight", "finite", "of 6"),
    ),
    "unknown part": ({f"{P}x.1.randlora_C": np.ones(1)}, ("x.1.randlora_C", "means nothing")),
    "no prefix": ({"x.1.randlora_lambda": np.ones(1)}, ("x.1.randlora_lambda", "means nothing")),
    "top-level lambda": (
        {"base_model.randlora_lambda": np.ones(1)},
        ("base_model.randlora_lambda", "means nothing"),
    ),
    "nameless layer": ({f"{P}x..randlora_A": np.ones(1)}, ("x..randlora_A", "means nothing")),
    "unprintable": ({f"{P}x\n.weight": np.ones((1, 1))}, (r"x\n.weight", "means nothing")),
    "not asked for": ({f"{P}x.1.scale": np.ones(1)}, ("x.1.scale", "modules_to_save")),
    "a wrapper's tensor alone": (
        {f"{P}head.modules_to_save.bias": np.ones(2)},
        ("head.modules_to_save.bias", f"expected the same tensor at '{P}head.bias'"),
    ),
    "two adapters": (
        {f"{LAMBDA}.one": np.ones((2, 3)), f"{GAMMA}.two": np.ones((3, 5))},
        ("x.1.randlora_gamma.two", "x.1.randlora_lambda.one", "two adapters"),
    ),
    "named and unnamed": (
        {f"{LAMBDA}.default": np.ones((2, 3))},
        ("x.1.randlora_lambda.default", "x.1.randlora_lambda", "same tensor twice"),
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors(folder, damage):
    changes, parts = TENSOR_DAMAGE[damage]
    change_tensors(folder, **changes)
    refused(folder, str(folder / WEIGHTS), *parts)


@pytest.mark.parametrize("key", ["base_model.randlora_B", f"{P}x.2.randlora_B"])
@pytest.mark.parametrize("how", ["last bit", "shape", "dtype"])
def test_copies_of_the_bases_that_differ(folder, key, how):
    tensors = load_file(folder / WEIGHTS)
    copy = {
        "last bit": tensors[B] + np.eye(9, 6, k=-4, dtype="f4").reshape(9, 3, 2) * 1e-7,
        "shape": tensors[B][:8],
        "dtype": tensors[B].astype(np.float16),
    }[how]
    other = key.replace("_B", "_A")
    change_tensors(folder, **{other: tensors[A], key: copy})
    first, second = sorted([B, key])  # safetensors orders by name
    if how == "dtype":
        first, second = B, key  # and by item size before
    refused(folder, first, second, "copies of one tensor and differ")
    change_tensors(folder, **{key: tensors[B]})
    read_adapter(folder)


def test_an_adapter_without_layers(folder):
    save_file({f"{P}head.weight": np.ones((2, 3), "f4")}, folder / WEIGHTS)
    refused(folder, WEIGHTS, "at least one layer, found none")


# --- the config, and what both files must agree on ----------------------------------------------


def change_config(folder: Path, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


CONFIG_DAMAGE = {
    "another rank": ({"r": 3}, ("x.1.randlora_gamma", "(2, 5)", "(3, 5)")),
    "rank zero": ({"r": 0}, (CONFIG, "r: expected a positive integer")),
    "another method": ({"peft_type": "LORA"}, (CONFIG, "'RANDLORA'", "'LORA'")),
    "bases denied": ({"save_projection": False}, (A, "expected no bases", "save_projection")),
    "no modules": ({"modules_to_save": None, "bias": "none"}, ("base_layer.bias", "bias='none'")),
    "of another save": (
        {"projection_prng_key": 5},
        ("projection_prng_key", "found 5", "do not belong together"),
    ),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_damaged_config(folder, damage):
    changes, parts = CONFIG_DAMAGE[damage]
    change_config(folder, **changes)
    refused(folder, str(folder), *parts)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "[" * 10**5, "\xff", "NaN"])
def test_config_that_is_no_json_object(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    refused(folder, str(folder / CONFIG))


METADATA_DAMAGE = {
    "no JSON": ("{", "not valid JSON"),
    "later version": ('{"version": 2}', "expected version 1, found 2"),
    "too little": ('{"version": 1}', "expected source"),
    "shapes of text": (
        json.dumps(
            {"version": 1, "projection_prng_key": 0, "shapes": {"x.1": "no"}}
            | dict.fromkeys(("source", "kind", "digest"), "")
        ),
        "[out, in]",
    ),
}


@pytest.mark.parametrize("damage", METADATA_DAMAGE)
def test_damaged_metadata(folder, damage):
    text, message = METADATA_DAMAGE[damage]
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"randlora_jax": text})
    refused(folder, str(folder / WEIGHTS), message)


def test_bases_other_than_the_recorded_ones(folder):
    raw = bytearray((folder / WEIGHTS).read_bytes())
    with safe_open(folder / WEIGHTS, "numpy") as file:
        expected = file.get_tensor(B).tobytes()
    raw[raw.index(expected) + 1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    refused(folder, WEIGHTS, "digest")


# --- the container --------------------------------------------------------------------------------


def entry(shape=(1,), offsets=(0, 4), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TWICE = b'{"a":%s,"a":%s}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode())
CONTAINERS = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "header longer than the file": (packed({}, length=10**6), "claims 1000000 bytes"),
    "header of exabytes": (packed({}, length=2**64 - 1), "truncated or no safetensors"),
    "no JSON": (packed(b"nonsense"), "not valid JSON"),
    "no UTF-8": (packed(b"\xff\xfe"), "not UTF-8"),
    "a list": (packed([]), "expected a JSON object"),
    "half a letter": (
        packed(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), b"1234"),
        "no safetensors file (",
    ),
    "too deep": (packed(b"[" * 10**5), "not valid JSON"),
    "a number of many digits": (packed(b'{"a":' + b"9" * 10**5 + b"}"), "not valid JSON"),
    "a name twice": (packed(TWICE, b"1234"), "'a' is given twice"),
    "no dtype": (packed({"a": {"shape": [], "data_offsets": [0, 0]}}), "'a': its header entry"),
    "no entry": (packed({"a": 3}), "'a': its header entry"),
    "unknown dtype": (packed({"a": entry(dtype="F31")}, b"1234"), "'a': dtype 'F31'"),
    "dtype of 4 bits": (packed({"a": entry([8], dtype="F4")}, b"1234"), "'a': dtype 'F4'"),
    "dtype a list": (packed({"a": entry(dtype=[])}, b"1234"), "'a': dtype []"),
    "negative side": (packed({"a": entry([-1])}, b"1234"), "'a': its shape is impossible"),
    "fractional side": (packed({"a": entry([1.0])}, b"1234"), "'a': its shape is impossible"),
    "true as a side": (packed({"a": entry([True])}, b"1234"), "'a': its shape is impossible"),
    "overflowing": (packed({"a": entry([2**33, 2**33])}, b"1234"), "'a': its shape is impossible"),
    "overflowing nothing": (
        packed({"a": entry([0, 2**70], (0, 0))}),
        "'a': its shape is impossible",
    ),
    "many sides": (packed({"a": entry([1] * 99)}, b"1234"), "'a': its shape is impossible"),
    "shape and offsets": (packed({"a": entry([2])}, b"1234"), "'a': F32 [2] takes 8 bytes"),
    "offsets reversed": (packed({"a": entry(offsets=(4, 0))}, b"1234"), "increasing"),
    "three offsets": (packed({"a": entry(offsets=(0, 2, 4))}, b"1234"), "increasing"),
    "overlapping": (
        packed({"a": entry(), "b": entry()}, b"1234"),
        "'b': its bytes begin at",
    ),
    "a hole": (packed({"a": entry(offsets=(4, 8))}, b"12345678"), "'a': its bytes begin at"),
    "beyond the end": (packed({"a": entry(offsets=(4, 8))}, b"1234"), "'a': F32 [1] takes 4"),
    "cut short": (packed({"a": entry()}, b"123"), "the file is cut off; copy or download it again"),
    "something appended": (packed({"a": entry()}, b"12345"), "or something was appended"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "__metadata__"),
    "a name of a megabyte": (packed({"a" * 10**6: 1}), "(1000000 characters)"),
}


@pytest.mark.parametrize("damage", CONTAINERS)
def test_damaged_container(folder, damage):
    raw, message = CONTAINERS[damage]
    (folder / WEIGHTS).write_bytes(raw)
    refused(folder, str(folder / WEIGHTS), message)
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder)
    assert len(str(caught.value)) < 1000
    # safetensors keeps the last of two, takes any number of sides, and knows what NumPy does not
    if damage not in ("a name twice", "many sides", "dtype of 4 bits"):
        with pytest.raises(SafetensorError), safe_open(folder / WEIGHTS, "numpy"):
            pass


def test_memory_is_bounded_by_the_file(folder):
    """Headers that claim terabytes cost nothing."""
    tracemalloc.start()
    for header in ({"a": entry([2**40], (0, 2**42))}, {A: entry([2, 1, 2**36], (0, 2**39))}):
        (folder / WEIGHTS).write_bytes(packed(header))
        refused(folder, "impossible")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


@st.composite
def damaged_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """`raw` with a few bytes changed, taken out or put in, mostly in its header."""
    data = bytearray(raw)
    (header,) = struct.unpack("<Q", raw[:8])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, 8 + header) | st.integers(0, len(data)))
        size = draw(st.sampled_from([0, 1, 1, 4, 30]))
        token = st.sampled_from([b"0", b"9", b"-1", b"[", b"}", b",", b'"', b"F16", b"A", b"."])
        data[at : at + size] = draw(token | st.binary(max_size=2))
    return bytes(data)


def test_random_damage_ends_in_our_error_or_in_a_sound_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_adapter(folder, sound())
    raw = (folder / WEIGHTS).read_bytes()
    outcomes = set()

    @given(damaged_bytes(raw))
    def check(damaged: bytes) -> None:
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            adapter = read_adapter(folder)
        except AdapterFileError as error:
            assert str(folder) in str(error)
            outcomes.add("refused")
        else:
            with safe_open(folder / WEIGHTS, "numpy"):  # we accept nothing that it refuses
                pass
            assert adapter.layers
            outcomes.add("read")

    check()
    assert "refused" in outcomes
