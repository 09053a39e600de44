"""safetensors files as we open and write them, beside the safetensors package."""

import errno
import os
import weakref

import ml_dtypes
import numpy as np
import pytest
from randlora_jax.interop import tensor_file
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.peft_dir import WEIGHTS_NAME, open_adapter
from randlora_jax.interop.tensor_file import TensorFile
from randlora_jax.interop.tensor_format import CODES, DTYPES
from randlora_jax.interop.tensor_writer import Entry, Stored, write_stream, write_tensors
from safetensors import safe_open
from safetensors.numpy import save_file


def arrays(rng) -> dict[str, np.ndarray]:
    """One of every dtype; a scalar, an empty one, one longer than a piece."""
    found = {code: rng.integers(0, 2, (3, 5)).astype(dtype) for code, dtype in DTYPES.items()}
    return found | {
        "scalar": np.float32(3)[...],
        "empty": np.zeros((0, 4), np.float16),
        "long": rng.normal(size=(300, 1000)).astype(np.float32),
        "transposed": rng.normal(size=(30, 10)).T,
    }


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        expected.tobytes(),
    )


def test_the_package_reads_what_we_write(tmp_path, rng):
    tensors, metadata = arrays(rng), {"format": "pt", "ü": "\n"}
    write_tensors(tmp_path / "x", tensors, metadata)
    with safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() == metadata
        assert set(file.keys()) == set(tensors)
        assert all(same(file.get_tensor(key), x) for key, x in tensors.items() if key != "C64")
    with TensorFile(tmp_path / "x") as file:
        assert all(file.tensors[key].start % x.itemsize == 0 for key, x in tensors.items())


def test_we_read_what_the_package_writes(tmp_path, rng):
    tensors = {k: np.ascontiguousarray(x) for k, x in arrays(rng).items() if k != "scalar"}
    save_file(tensors, tmp_path / "x", metadata={"a": "b"})
    with TensorFile(tmp_path / "x") as file:
        assert file.metadata == {"a": "b"}
        assert file.tensors.keys() == tensors.keys()
        assert all(same(file.read(file.tensors[key]), x) for key, x in tensors.items())
        starts = [tensor.start for tensor in file.tensors.values()]
        assert starts == sorted(starts)


def test_a_stream_is_written_in_its_order_and_made_tensor_by_tensor(tmp_path, rng):
    tensors = {key: rng.normal(size=(4, 3)).astype(np.float32) for key in ("b", "a", "c")}
    entries = {key: Entry("BF16", x.shape) for key, x in tensors.items()}
    told: list[int] = []
    write_stream(tmp_path / "x", entries, {}, tensors.__getitem__, told.append)
    assert told == [24, 24, 24]
    with TensorFile(tmp_path / "x") as file:
        assert list(file.tensors) == ["b", "a", "c"]
        for key, x in tensors.items():
            assert same(file.read(file.tensors[key]), x.astype(ml_dtypes.bfloat16))
    with pytest.raises(FileExistsError):
        write_stream(tmp_path / "x", entries, {}, tensors.__getitem__)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    assert np.dtype(ml_dtypes.float8_e4m3fn) not in CODES
    with pytest.raises(AdapterFileError, match="'a': safetensors has no name for float8_e4m3fn"):
        write_tensors(tmp_path / "x", {"a": np.zeros(3, ml_dtypes.float8_e4m3fn)}, {})
    assert not (tmp_path / "x").exists()


def replace_once(monkeypatch, path, other: bytes) -> None:
    """Let another process replace the file just before the package opens it, once."""

    def opening(name, framework):
        if not replaced:
            replaced.append(path)
            path.with_suffix(".new").write_bytes(other)
            os.replace(path.with_suffix(".new"), path)
        return safe_open(name, framework=framework)

    replaced: list = []
    monkeypatch.setattr(tensor_file, "safe_open", opening)


def test_a_file_that_is_replaced_while_it_is_opened(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x", {"a": np.ones(3)}, {})
    write_tensors(tmp_path / "y", {"b": np.ones((5, 5))}, {})
    other = (tmp_path / "y").read_bytes()
    replace_once(monkeypatch, tmp_path / "x", other)
    with pytest.raises(FileNotFoundError, match="replaced while it was opened"):
        TensorFile(tmp_path / "x")
    with TensorFile(tmp_path / "x") as file:
        assert list(file.tensors) == ["b"]


def test_an_adapter_that_is_replaced_while_it_is_opened_is_read_anew(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "RANDLORA"}')
    write_tensors(tmp_path / WEIGHTS_NAME, {"a": np.ones(3)}, {})
    write_tensors(tmp_path / "y", {"b": np.ones((5, 5))}, {})
    replace_once(monkeypatch, tmp_path / WEIGHTS_NAME, (tmp_path / "y").read_bytes())
    _, file = open_adapter(tmp_path)
    with file:
        assert list(file.tensors) == ["b"]


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path):
    """Through a mapping of the file, it would end the process."""
    write_tensors(tmp_path / "x", {"a": np.ones(1 << 16)}, {})
    with TensorFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 4096)
        with pytest.raises(AdapterFileError, match=r"'a': the file ends inside it, .* bytes short"):
            file.read(file.tensors["a"])


@pytest.fixture
def stored(tmp_path, rng):
    arrays = {"a": rng.normal(size=(300, 70)), "scalar": np.array(2.5), "none": np.zeros((0, 3))}
    write_tensors(tmp_path / "from", arrays, {})
    return tmp_path, arrays


@pytest.mark.parametrize("call", [True, False])
def test_tensors_are_taken_over_bit_for_bit(call, stored, monkeypatch):
    folder, arrays = stored
    if not call:  # as on systems that cannot copy within themselves, or only a part of it
        done = os.copy_file_range if hasattr(os, "copy_file_range") else None

        def refuse(source, target, count, offset_src):
            if done is None or offset_src % 2:
                raise OSError(errno.EXDEV, "not on one filesystem")
            return done(source, target, min(count, 1001), offset_src)

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    with TensorFile(folder / "from") as file:
        entries = {key: Entry("F64", x.shape) for key, x in arrays.items()}
        new = {"b": arrays["a"] + 1}
        entries["b"] = Entry("F64", new["b"].shape)
        write_stream(
            folder / "to",
            entries,
            {},
            lambda key: new[key] if key in new else Stored(file, file.tensors[key]),
        )
    with TensorFile(folder / "to") as file:
        for key, array in (arrays | new).items():
            assert file.tensors[key].shape == array.shape
            assert file.holds(file.tensors[key], array)


def test_a_tensor_whose_file_ends_early_is_not_taken_over(stored):
    folder, arrays = stored
    with TensorFile(folder / "from") as file:
        os.truncate(folder / "from", file.size - 8)
        with pytest.raises(AdapterFileError, match="the file ends inside it, 8 bytes short"):
            write_stream(
                folder / "to",
                {key: Entry("F64", x.shape) for key, x in arrays.items()},
                {},
                lambda key: Stored(file, file.tensors[key]),
            )


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    made = []

    def make(key):
        assert all(earlier() is None for earlier in made)
        array = np.ones((100, 100), np.float32)
        made.append(weakref.ref(array))
        return array

    write_stream(tmp_path / "x", {key: Entry("F32", (100, 100)) for key in "abc"}, {}, make)
    assert len(made) == 3
