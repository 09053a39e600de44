"""Where a base model's layers lie in its files, against the PyTorch models that wrote them."""

import json
import re

import pytest
import torch
import transformers
from families import FAMILIES
from randlora_jax.interop.base_model import BaseModel, base_shapes
from randlora_jax.interop.errors import AdapterFileError, TargetError
from safetensors.torch import save_file
from torch_files import load_file

pytestmark = pytest.mark.torch


def make(family, **changes):
    torch.manual_seed(0)
    name, config, _ = FAMILIES[family]
    return getattr(transformers, name)(type(config())(**{**config().to_dict(), **changes}))


def linears(model):
    """{path: (out, in)} as PEFT sees them, which is what the functions here must find."""
    conv1d = transformers.pytorch_utils.Conv1D
    return {
        name: tuple(module.weight.shape)[:: -1 if isinstance(module, conv1d) else 1]
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, conv1d))
    }


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shapes_of_every_linear_layer(family, sharded, tmp_path):
    model = make(family)  # OPT's and GPT-2's lm_head are tied and have no tensor
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert base_shapes(tmp_path, linears(model)) == linears(model)


@pytest.mark.parametrize("family, base", [("bert", "bert"), ("gpt2", "transformer")])
def test_names_with_and_without_the_prefix(family, base, tmp_path):
    model = make(family)
    inner = getattr(model, base)
    inside, outside = linears(inner), {f"{base}.{k}": v for k, v in linears(inner).items()}
    inner.save_pretrained(tmp_path / "without")
    assert base_shapes(tmp_path / "without", inside) == inside
    assert base_shapes(tmp_path / "without", outside) == outside
    model.save_pretrained(tmp_path / "with")
    assert base_shapes(tmp_path / "with", inside) == inside
    assert base_shapes(tmp_path / "with", outside) == outside


def write_checkpoint(folder, **tensors):
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")


def test_a_name_that_could_be_two_layers_is_refused(tmp_path):
    text, image = torch.zeros(3, 2), torch.zeros(4, 2)
    write_checkpoint(tmp_path, **{"text.lin.weight": text, "image.lin.weight": image})
    assert base_shapes(tmp_path, ["text.lin", "image.lin"])["image.lin"] == (4, 2)
    with pytest.raises(
        TargetError, match=r"'lin' could be '(text|image)\.lin' or '(text|image)\.lin'"
    ):
        base_shapes(tmp_path, ["lin"])


def test_a_name_as_it_stands_comes_first(tmp_path):
    write_checkpoint(
        tmp_path, **{"lin.weight": torch.zeros(3, 2), "a.lin.weight": torch.zeros(4, 2)}
    )
    assert base_shapes(tmp_path, ["lin"]) == {"lin": (3, 2)}


def test_a_decoder_of_another_kind_decides_for_its_own_layers(tmp_path):
    bert = transformers.BertConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16
    )
    gpt2 = transformers.GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2)
    model = transformers.EncoderDecoderModel(both)
    model.save_pretrained(tmp_path)
    found = linears(model)
    assert found["decoder.transformer.h.0.mlp.c_fc"] == (48, 12)
    assert base_shapes(tmp_path, found) == found


def test_what_is_missing_is_named(tmp_path):
    make("bert").bert.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"no tensor 'classifier\.weight'.*with its head"):
        base_shapes(tmp_path, ["bert.encoder.layer.0.output.dense", "classifier"])


def test_directories_that_are_no_checkpoint(tmp_path):
    with pytest.raises(AdapterFileError, match=r"config\.json"):
        base_shapes(tmp_path, [])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"found neither$"):
        base_shapes(tmp_path, [])
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "a1b2")
    with pytest.raises(AdapterFileError, match=r"a link to .*a1b2, .*: download the model again"):
        base_shapes(tmp_path, [])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"but pytorch_model\.bin"):
        base_shapes(tmp_path, [])
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../evil.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(AdapterFileError, match="names of files beside it"):
            base_shapes(tmp_path, [])
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(AdapterFileError, match=r"gone\.safetensors: cannot be read"):
        base_shapes(tmp_path, [])


def test_tied_weights(tmp_path):
    tied, untied = make("opt"), make("opt", tie_word_embeddings=False)
    tied.save_pretrained(tmp_path / "tied")
    untied.save_pretrained(tmp_path / "untied")
    with BaseModel(tmp_path / "tied") as base:
        assert base.tied("lm_head.weight") == "model.decoder.embed_tokens.weight"
        assert base.tied("model.decoder.embed_tokens.weight")
        assert base.tied("model.decoder.layers.0.fc1.weight") is None
        assert base.tied("model.decoder.layers.0.fc1.bias") is None
    with BaseModel(tmp_path / "untied") as base:
        assert base.tied("lm_head.weight") is None


def test_positions_that_are_as_many_as_tokens_share_nothing(tmp_path):
    make("gpt2", n_positions=97).save_pretrained(tmp_path)
    with BaseModel(tmp_path) as base:
        assert base.tied("transformer.wte.weight") == "the output layer"
        assert base.tied("transformer.wte.weight", has_head=False) is None
        assert base.tied("transformer.wpe.weight") is None


def test_a_head_saved_beside_the_embedding_it_is_tied_to(tmp_path):
    make("opt").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()
    save_file(tensors, file)
    with BaseModel(tmp_path) as base:
        assert base.tied("lm_head.weight") == "model.decoder.embed_tokens.weight"


def test_layernorm_names_from_before_pytorch(tmp_path):
    make("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {
        re.sub(r"(?<=LayerNorm\.)(weight|bias)$", lambda match: old[match[1]], key): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    with BaseModel(tmp_path) as base:
        found = base.find("bert.embeddings.LayerNorm.bias")
        assert found == "bert.embeddings.LayerNorm.beta"


def test_a_configuration_with_numbers_that_are_no_json(tmp_path):
    """As transformers writes for Mamba 2."""
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": NaN}')
    assert base_shapes(tmp_path, ["a"]) == {"a": (3, 4)}
