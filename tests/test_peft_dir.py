"""PEFT's own files are read whatever their variant; PEFT and transformers open ours."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from randlora_jax.interop.peft_dir import (
    Adapter,
    Provenance,
    bases_digest,
    derived_key,
    read_adapter,
    write_adapter,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from randlora_jax.config import RandLoraConfig
from randlora_jax.errors import AdapterFileError, ConfigError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(5, 4)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.dense(x))


class Net(torch.nn.Module):
    """Layers wide, tall and square, numbered so that the first by letters is not the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {2: (7, 10), 10: (10, 10), 11: (10, 5)}
        self.layer = torch.nn.ModuleDict({str(i): torch.nn.Linear(*s) for i, s in sizes.items()})
        self.head = Head()

    def forward(self, x):
        for layer in self.layer.values():
            x = layer(x).tanh()
        return self.head(x)


TARGETS = ["layer.2", "layer.10", "layer.11"]
NET_INPUT = torch.linspace(-1, 1, 21).reshape(3, 7)


def randomize(model: torch.nn.Module) -> None:
    """Give all that trains some value of its own, as training would."""
    torch.manual_seed(1)
    for x in model.parameters():
        if x.requires_grad:
            x.data = 0.1 * torch.randn_like(x)


def peft_settings(**config) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(r=3, target_modules=TARGETS, randlora_alpha=3, **config)


def peft_net(directory: Path, **config) -> torch.Tensor:
    """Let PEFT save a trained adapter of `Net`; its output."""
    model = peft.get_peft_model(Net(), peft_settings(**config)).eval()
    randomize(model)
    model.save_pretrained(directory)
    output = run(model)
    assert (output - run(Net())).abs().max() > 1e-2, "the adapter changes nothing"
    return output


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(NET_INPUT)


def rewrite(directory: Path, change) -> None:
    """Replace a directory's tensors by `change(tensors)`."""
    tensors = change(load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def is_base(key: str) -> bool:
    return key.endswith(("randlora_A", "randlora_B"))


def keep_bases(tensors: dict, wanted) -> dict:
    return {key: x for key, x in tensors.items() if not is_base(key) or wanted(key)}


def cast(tensors: dict, dtype) -> dict:
    small = ("randlora_lambda", "randlora_gamma")
    return {key: x.astype(dtype) if key.endswith(small) else x for key, x in tensors.items()}


def with_adapter_names(tensors: dict) -> dict:
    return {f"{key}.default" if "randlora_" in key else key: x for key, x in tensors.items()}


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
    with pytest.raises(AdapterFileError, match=r"head\.dense\.bias .* and .*modules_to_save"):
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


# --- bases that PyTorch did not draw -----------------------------------------------------------


def jax_adapter(rng: np.random.Generator) -> Adapter:
    """An adapter of `Net` with bases of its own."""
    shapes = {
        f"layer.{i}": (layer.out_features, layer.in_features) for i, layer in Net().layer.items()
    }
    r, big, small = 3, 10, 10
    a = rng.normal(size=(r, 1, small)).astype(np.float32)
    b = rng.normal(size=(big, 4, r)).astype(np.float32)
    layers = {}
    for name, shape in shapes.items():
        n = -(-min(shape) // r)
        layers[name] = (
            rng.normal(size=(r, n)).astype(np.float32),
            rng.normal(size=(n, min(shape))).astype(np.float32),
        )
    return Adapter(
        config=RandLoraConfig(r=r, target_modules=TARGETS, projection_prng_key=42),
        layers=layers,
        bases=(a, b),
        provenance=Provenance("jax", 42, "dense", bases_digest(a, b), shapes),
    )


def delta_of(adapter: Adapter, name: str, out: int) -> np.ndarray:
    """The update by the definition: lambda and gamma scale A, B is summed over bases and ranks."""
    lam, gamma = (x.astype(np.float64) for x in adapter.layers[name])
    a, b = (x.astype(np.float64) for x in adapter.bases)
    n, low = gamma.shape
    high = max(adapter.provenance.shapes[name])
    scaled = np.einsum("kb,kj,bj->kbj", lam, a[:, 0, :low], gamma)  # rank slow, basis fast
    flat_b = b[:high, :n].reshape(high, -1)  # basis slow, rank fast
    m = flat_b @ scaled.reshape(-1, low) * adapter.config.scaling
    return m if m.shape[0] == out else m.T


def test_bases_of_our_own_in_peft(tmp_path, rng):
    adapter = jax_adapter(rng)
    write_adapter(tmp_path, adapter)
    opened = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for name in TARGETS:
        layer = opened.base_model.model.get_submodule(name)
        expected = delta_of(adapter, name, layer.out_features)
        found = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    again = read_adapter(tmp_path)
    assert again.provenance == adapter.provenance
    assert again.config.projection_prng_key == derived_key(adapter.provenance.digest) < 2**62
    write_adapter(tmp_path, again)  # the key is derived, not derived once more
    assert read_adapter(tmp_path).config == again.config


def test_peft_refuses_our_bases_beside_its_own(tmp_path, rng):
    write_adapter(tmp_path / "ours", jax_adapter(rng))
    peft_net(tmp_path / "theirs")
    for first, second in (("ours", "theirs"), ("theirs", "ours")):
        model = peft.PeftModel.from_pretrained(Net(), tmp_path / first)
        with pytest.raises(ValueError, match="PRNG"):
            model.load_adapter(tmp_path / second, adapter_name="other")


def test_what_cannot_be_written(tmp_path, rng):
    adapter = jax_adapter(rng)
    torch_config = dataclasses.replace(
        adapter.config, projection_source="torch", save_projection=False
    )
    with pytest.raises(ConfigError, match="only PyTorch's own bases can be drawn again"):
        write_adapter(tmp_path, dataclasses.replace(adapter, config=torch_config))
    other = (adapter.bases[0] * 2, adapter.bases[1])
    with pytest.raises(AdapterFileError, match="digest"):
        write_adapter(tmp_path, dataclasses.replace(adapter, bases=other))
    wide = dataclasses.replace(adapter.provenance, shapes=dict.fromkeys(TARGETS, (12, 7)))
    with pytest.raises(AdapterFileError, match=r"layer\.10\.randlora_gamma: expected 7, found 10"):
        write_adapter(tmp_path, dataclasses.replace(adapter, provenance=wide))
    lam, gamma = adapter.layers["layer.2"]
    for bad in ((lam.astype(np.float64), gamma), (lam, gamma * np.nan), (lam, gamma.T)):
        broken = dataclasses.replace(adapter, layers=adapter.layers | {"layer.2": bad})
        with pytest.raises(AdapterFileError, match=r"layer\.2\.randlora_(lambda|gamma)"):
            write_adapter(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []

    write_adapter(tmp_path, adapter)
    with pytest.raises(AdapterFileError, match="may not be overwritten"):
        write_adapter(tmp_path, adapter, overwrite=False)


def test_bases_without_loss_only(tmp_path, rng):
    """float32 that bfloat16 cannot hold stays float32; float16 stays float16."""
    adapter = dataclasses.replace(jax_adapter(rng), provenance=None)
    for bases in (adapter.bases, tuple(x.astype(np.float16) for x in adapter.bases)):
        write_adapter(tmp_path, dataclasses.replace(adapter, bases=bases))
        for found, expected in zip(read_adapter(tmp_path).bases, bases, strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_digest_knows_numbers_and_shapes_not_dtypes(rng):
    a = rng.normal(size=(2, 1, 8)).astype(ml_dtypes.bfloat16)
    b = rng.normal(size=(9, 4, 2)).astype(ml_dtypes.bfloat16)
    digest = bases_digest(a, b)
    assert digest == bases_digest(a.astype(np.float32), np.asfortranarray(b.astype(np.float32)))
    assert digest != bases_digest(a.reshape(1, 2, 8), b)
    assert digest != bases_digest(-a, b)
    known = bases_digest(np.arange(4.0).reshape(2, 1, 2), np.arange(8.0).reshape(4, 1, 2))
    assert known.startswith("c9f8ac34da5a1b5f")
    assert derived_key("f" * 64) == 2**62 - 1


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


def test_metadata_is_one_readable_line(tmp_path, rng):
    adapter = jax_adapter(rng)
    write_adapter(tmp_path, adapter)
    with safe_open(tmp_path / WEIGHTS, framework="numpy") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "randlora_jax"} and metadata["format"] == "pt"
    recorded = json.loads(metadata["randlora_jax"])
    assert recorded["version"] == 1 and recorded["projection_prng_key"] == 42
    assert recorded["shapes"]["layer.2"] == [10, 7]


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
    adapter.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    tracemalloc.start()
    read_adapter(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * b.nbytes


def test_missing_files_are_named(tmp_path):
    with pytest.raises(AdapterFileError, match="expected an adapter directory, found none"):
        read_adapter(tmp_path / "nowhere")
    peft_net(tmp_path / "nested" / "second")
    with pytest.raises(AdapterFileError, match=r"adapters in subfolders.*\['second'\]"):
        read_adapter(tmp_path / "nested")
    (tmp_path / "nested" / "second" / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=f"found no {WEIGHTS}"):
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
