"""Which weights of a model directory are read, and which directories are refused."""

import json

import numpy as np
import pytest
from randlora_jax.interop.base_model import BaseModel, base_shapes
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.tensor_writer import write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}


def write(path, *keys, rows=2):
    write_tensors(path, {key: np.ones((rows, 3), np.float32) for key in keys}, {"format": "pt"})


@pytest.fixture
def sharded(tmp_path):
    for key, name in SHARDS.items():
        write(tmp_path / name, key)
    index(tmp_path, SHARDS)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def index(folder, places, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(folder):
    with pytest.raises(AdapterFileError) as error:
        base_shapes(folder, ["a"])
    return str(error.value)


def test_a_single_file_comes_before_an_index(sharded):
    write(sharded / SINGLE, "a.weight", rows=5)
    with BaseModel(sharded) as base:
        assert base.index is None and list(base.files) == [SINGLE]
    assert base_shapes(sharded, ["a"]) == {"a": (5, 3)}


@pytest.mark.parametrize("chosen", ["mine.safetensors", "mine.safetensors.index.json"])
def test_the_file_that_config_json_names_comes_first(sharded, chosen):
    write(sharded / SINGLE, "a.weight", rows=5)
    write(sharded / "mine.safetensors", "a.weight", rows=7)
    index(sharded, {"a.weight": "mine.safetensors"}, "mine.safetensors.index.json")
    (sharded / "config.json").write_text(json.dumps({"transformers_weights": chosen}))
    assert base_shapes(sharded, ["a"]) == {"a": (7, 3)}
    (sharded / "config.json").write_text(json.dumps({"transformers_weights": "../x.safetensors"}))
    assert "names of files beside it" in refusal(sharded)


def test_shards_that_are_not_listed_are_not_read(sharded):
    write(sharded / "old.safetensors", "a.weight", "c.weight")
    with BaseModel(sharded) as base:
        assert base.home == SHARDS


def test_an_index_and_its_shards_must_agree(sharded):
    index(sharded, {**SHARDS, "c.weight": "two.safetensors"})
    assert "incomplete" in refusal(sharded) and "'c.weight' should be in two" in refusal(sharded)
    index(sharded, {**SHARDS, "a.weight": "two.safetensors", "d.weight": "one.safetensors"})
    assert "'a.weight' should be in two.safetensors, and it is in one" in refusal(sharded)
    write(sharded / "three.safetensors", "c.weight", "d.weight")
    index(sharded, {**SHARDS, "c.weight": "three.safetensors"})
    assert "incomplete" in refusal(sharded) and "hold 'd.weight'" in refusal(sharded)
    (sharded / "three.safetensors").unlink()
    assert "three.safetensors: cannot be read" in refusal(sharded)
    assert "incomplete" in refusal(sharded)


@pytest.mark.parametrize(
    "name, words",
    [
        ("flax_model.msgpack", 'transformers.OPTModel.from_pretrained("{}", from_flax=True)'),
        ("flax_model-00001-of-00002.msgpack", "from_flax=True"),
        ("tf_model.h5", "from_tf=True"),
        ("model-q4.gguf", "gguf_file"),
        ("pytorch_model-00001-of-00002.bin", "load it in PyTorch"),
    ],
)
def test_other_formats_alone_say_how_to_convert_them(name, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OPTModel"]}))
    (tmp_path / name).write_bytes(b"")
    assert f"found neither but {name}" in refusal(tmp_path)
    assert words.format(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "config, method",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "'fp8'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors'"),
        ({"quantization_config": {"load_in_4bit": True}}, "not named"),
        ({"quantization_config": "awq"}, "'awq'"),
    ],
)
def test_quantised_models_are_refused_by_method(sharded, config, method):
    (sharded / "config.json").write_text(json.dumps(config))
    message = refusal(sharded)
    assert f"quant_method {method}" in message or method in message
    assert "Give the directory of the model that it was made from" in message


def test_quantised_models_that_say_so_in_a_file_of_its_own(sharded):
    (sharded / "quantize_config.json").write_text("{}")
    assert "'gptq'" in refusal(sharded)


def test_a_quantisation_that_is_none(sharded):
    (sharded / "config.json").write_text(json.dumps({"quantization_config": None}))
    assert base_shapes(sharded, ["a"]) == {"a": (2, 3)}
