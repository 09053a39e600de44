"""PEFT's own files are read whatever their variant; PEFT and transformers open ours."""

import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from peft_nets import (
    PREFIX,
    TARGETS,
    WEIGHTS,
    Net,
    cast,
    is_base,
    jax_adapter,
    keep_bases,
    peft_net,
    peft_settings,
    randomize,
    rewrite,
    run,
    with_adapter_names,
)
from randlora_jax.interop.adapter import bases_digest
from randlora_jax.interop.errors import AdapterFileError, ConfigError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.torch

VARIANTS = {
    "as PEFT writes": lambda t: t,
    "top level only": lambda t: keep_bases(t, lambda key: not key.startswith(PREFIX)),
    "layers only": lambda t: keep_bases(t, lambda key: key.startswith(PREFIX)),
    "one layer only": lambda t: keep_bases(t, lambda key: "layer.10." in key),
    "f16": lambda t: cast(t, np.float16),
    "bf16": lambda t: cast(t, ml_dtypes.bfloat16),
    "f16 bases": lambda t: {k: x.astype(np.float16) if is_base(k) else x for k, x in t.items()},
    "with adapter names": with_adapter_names,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_read(tmp_path, variant):
    peft_net(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    rewrite(tmp_path, VARIANTS[variant])
    found = load_file(tmp_path / WEIGHTS)
    adapter = read_adapter(tmp_path)
    assert sorted(adapter.layers) == sorted(TARGETS)
    suffix = ".default" if variant == "with adapter names" else ""
    for name, arrays in adapter.layers.items():
        for part, array in zip(("lambda", "gamma"), arrays, strict=True):
            expected = found[f"{PREFIX}{name}.randlora_{part}{suffix}"]
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected.astype(np.float32))
    for part, array in zip("AB", adapter.bases, strict=True):
        assert array.dtype == (np.float16 if variant == "f16 bases" else np.float32)
        np.testing.assert_array_equal(
            array, whole[f"base_model.randlora_{part}"].astype(array.dtype)
        )
    assert adapter.config.projection_source == "file"
    assert adapter.provenance is None and adapter.saved == {}


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_file_without_bases(tmp_path, save_projection):
    """PEFT draws them from the key, whether the config announces it or not."""
    output = peft_net(tmp_path, save_projection=save_projection, projection_prng_key=7)
    rewrite(tmp_path, lambda tensors: keep_bases(tensors, lambda key: False))
    adapter = read_adapter(tmp_path)
    assert adapter.bases is None
    assert adapter.config.projection_source == "torch"
    if save_projection:
        with pytest.raises(ConfigError, match="save_projection is True and the adapter has no"):
            write_adapter(tmp_path / "out", adapter)
    else:
        write_adapter(tmp_path / "out", adapter)
        opened = peft.PeftModel.from_pretrained(Net(), tmp_path / "out")
        torch.testing.assert_close(run(opened), output, rtol=0, atol=0)


KINDS = {
    "dense": {},
    "sparse": {"sparse": True},
    "very sparse": {"very_sparse": True},
    "bias all": {"bias": "all"},
    "bias randlora_only": {"bias": "randlora_only"},
    "whole modules": {"modules_to_save": ["head"]},
    "whole modules and all biases": {"modules_to_save": ["head"], "bias": "all"},
    "another key": {"projection_prng_key": 2**40 + 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_we_write(tmp_path, kind):
    output = peft_net(tmp_path / "peft", **KINDS[kind])
    adapter = read_adapter(tmp_path / "peft")
    write_adapter(tmp_path / "ours", adapter)
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        opened = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours", **kwargs)
        torch.testing.assert_close(run(opened), output, rtol=0, atol=0)
    if "bias" not in KINDS[kind]:  # of which PEFT takes one adapter only
        settings = dataclasses.replace(peft_settings(**KINDS[kind]), init_weights=False)
        second = peft.get_peft_model(Net(), settings, adapter_name="first")
        second.load_adapter(tmp_path / "ours", adapter_name="second")
        second.set_adapter("second")
        torch.testing.assert_close(run(second), output, rtol=0, atol=0)


def test_one_copy_of_the_bases_under_the_first_layer(tmp_path):
    peft_net(tmp_path / "dense")
    peft_net(tmp_path / "sparse", sparse=True)
    for kind, dtype in (("dense", ml_dtypes.bfloat16), ("sparse", np.float32)):
        adapter = read_adapter(tmp_path / kind)
        write_adapter(tmp_path / "out", adapter)
        tensors = load_file(tmp_path / "out" / WEIGHTS)
        bases = {key: x.dtype for key, x in tensors.items() if is_base(key)}
        assert bases == {
            f"{PREFIX}layer.2.randlora_A": dtype,  # 2 before 10, as people count
            f"{PREFIX}layer.2.randlora_B": dtype,
        }
        assert len(tensors) == 2 + 2 * len(TARGETS)
        again = read_adapter(tmp_path / "out")
        assert bases_digest(*again.bases) == bases_digest(*adapter.bases)
        assert again.config == adapter.config


def test_repeated_biases_of_whole_modules(tmp_path):
    """With bias="all" PEFT writes them three times: two must agree, one is the base model's."""
    peft_net(tmp_path, modules_to_save=["head"], bias="all")
    saved = read_adapter(tmp_path).saved
    tensors = load_file(tmp_path / WEIGHTS)
    twin = f"{PREFIX}head.modules_to_save.default.dense.bias"
    np.testing.assert_array_equal(saved["head.dense.bias"], tensors[twin])
    assert saved["head.norm.num_batches_tracked"].dtype == np.int64
    np.testing.assert_array_equal(
        saved["head.original_module.dense.bias"], Net().head.dense.bias.detach().numpy()
    )
    assert not [key for key in saved if "modules_to_save" in key]
    rewrite(tmp_path, lambda t: t | {twin: t[twin] + 1})
    with pytest.raises(AdapterFileError, match=r"head\.dense\.bias' .* and .*modules_to_save"):
        read_adapter(tmp_path)


def test_a_raw_state_dict(tmp_path):
    peft_net(tmp_path, modules_to_save=["head"])
    saved = read_adapter(tmp_path).saved

    def raw(tensors):
        return {
            key.replace("head.", "head.modules_to_save.default."): x
            for key, x in with_adapter_names(tensors).items()
        }

    rewrite(tmp_path, raw)
    assert read_adapter(tmp_path).saved.keys() == saved.keys()


# --- transformers -------------------------------------------------------------------------------


def bert() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
    )
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.arange(10).reshape(2, 5)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_every_way_of_opening_in_transformers(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    base = bert().from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.RandLoraConfig(r=4, target_modules=["query", "dense"]))
    randomize(model)
    model.save_pretrained(tmp_path / "peft")
    expected = logits(model)
    assert (expected - logits(bert())).abs().max() > 1e-2
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "peft"))
    injected = bert()
    injected.load_adapter(tmp_path / "ours")
    opened = {
        "PeftModel": peft.PeftModel.from_pretrained(bert(), tmp_path / "ours"),
        "load_adapter": injected,
        "from_pretrained": transformers.BertForSequenceClassification.from_pretrained(
            tmp_path / "ours"
        ),
    }
    for how, other in opened.items():
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-6, msg=how)


def test_a_classifier_of_its_own(tmp_path):
    settings = peft.RandLoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    model = peft.get_peft_model(bert(), settings)
    randomize(model)
    model.save_pretrained(tmp_path / "peft")
    write_adapter(tmp_path / "ours", read_adapter(tmp_path / "peft"))
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        opened = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours", **kwargs)
        torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


# --- the directory -------------------------------------------------------------------------------


def test_reading_holds_one_copy_of_the_bases(tmp_path, rng):
    """Thirty copies in the file, one in memory."""
    adapter = dataclasses.replace(jax_adapter(rng), provenance=None)
    lam, gamma = adapter.layers["layer.10"]
    a, b = adapter.bases[0], np.zeros((500_000, 4, 3), np.float32)
    tensors = {}
    for i in range(30):
        name = f"{PREFIX}layer.{i}.randlora_"
        tensors |= {f"{name}{k}": x for k, x in zip("AB", (a, b), strict=True)}
        tensors |= {f"{name}lambda": lam, f"{name}gamma": gamma}
    names = [f"layer.{i}" for i in range(30)]
    dataclasses.replace(adapter.config, target_modules=names).save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    tracemalloc.start()
    read_adapter(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * b.nbytes


def test_missing_files_are_named(tmp_path):
    with pytest.raises(AdapterFileError, match="expected an adapter directory, found none"):
        read_adapter(tmp_path / "nowhere")
    peft_net(tmp_path / "nested" / "second")
    with pytest.raises(AdapterFileError, match=r"adapters in subfolders.*: 'second'$"):
        read_adapter(tmp_path / "nested")
    (tmp_path / "nested" / "second" / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=f"found no {WEIGHTS}; name the directory"):
        read_adapter(tmp_path / "nested" / "second")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    model = peft.get_peft_model(Net(), peft_settings())
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(AdapterFileError, match="pickle") as caught:
        read_adapter(tmp_path)
    code = str(caught.value).splitlines()[-1].split('python -c "')[1].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert sorted(read_adapter(tmp_path).layers) == sorted(TARGETS)
