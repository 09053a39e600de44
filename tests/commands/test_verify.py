"""randlora-jax verify: agreement is found, and every kind of disagreement."""

import importlib
import json
import sys

import jax
import numpy as np
import pytest
import torch
from families import FAMILIES, twins
from peft_side import save_adapter, save_base
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.numpy_delta import Deltas
from safetensors.torch import save_file
from torch_files import load_file

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.commands.flax_twin import FlaxTwin
from randlora_jax.commands.main import main
from randlora_jax.commands.verify import difference, verify

pytestmark = pytest.mark.torch

SETTINGS = {
    "bert": {"bias": "all", "modules_to_save": ["pooler"]},
    "gpt2": {"bias": "randlora_only"},
    "llama": {"modules_to_save": ["lm_head"]},
    "opt": {"target_modules": ["q_proj", "fc1"]},
}


def kinds(report):
    return {item["kind"] for item in report.data["differences"]}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapter_of_pefts(family, tmp_path):
    dtype = torch.bfloat16 if family in ("bert", "llama") else torch.float32
    save_base(family, tmp_path / "base", dtype, shard="20KB")
    model = save_adapter(family, tmp_path / "base", tmp_path / "adapter", dtype, **SETTINGS[family])
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert report.good, report.text
    assert report.data["note"] == ""
    assert kinds(report) >= {"delta_W", "logits"}
    compared = {d["what"] for d in report.data["differences"] if d["kind"] == "delta_W"}
    assert compared == {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "randlora_lambda")
    }
    assert (kinds(report) >= {"trained tensors"}) == (family != "opt")


def test_an_adapter_of_ours(tmp_path, capsys):
    pair = twins("gpt2", tmp_path / "base")
    config = RandLoraConfig(r=7, randlora_alpha=14, target_modules=FAMILIES["gpt2"][2])
    ours = get_peft_model(pair.flax, config)
    noise = np.random.default_rng(0)
    move = lambda x: x + noise.normal(0, 0.3, x.shape).astype("f")  # noqa: E731
    ours.params = {**ours.params, "randlora": jax.tree.map(move, ours.params["randlora"])}
    ours.save_pretrained(tmp_path / "adapter")
    command = ["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    assert "agree" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["good"]


def test_an_adapter_without_bases_needs_the_right_generation(tmp_path):
    save_base("opt", tmp_path / "base")
    save_adapter("opt", tmp_path / "base", tmp_path / "adapter", save_projection=False)
    right, wrong = (
        verify(tmp_path / "adapter", base=tmp_path / "base", torch_generation=generation)
        for generation in ("bf16-24bit", "bf16-8bit")
    )
    assert right.good, right.text
    assert not wrong.good
    bad = {item["kind"] for item in wrong.data["differences"] if not item["good"]}
    assert bad == {"delta_W", "logits"}


def test_bases_that_are_drawn_have_the_base_models_dtype(tmp_path):
    save_base("opt", tmp_path / "base", torch.bfloat16)
    settings = {"sparse": True, "save_projection": False}
    save_adapter("opt", tmp_path / "base", tmp_path / "adapter", torch.bfloat16, **settings)
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert [item["what"] for item in report.data["differences"] if not item["good"]] == []
    assert "logits" in kinds(report)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_base("opt", folder / "base")
    save_adapter("opt", folder / "base", folder / "adapter", modules_to_save=["project_out"])
    return folder


def test_one_wrong_layer_is_found_and_named(pair, monkeypatch, capsys):
    right = Deltas.of

    def wrong(self, name):
        return right(self, name) * (1.0001 if name.endswith("1.self_attn.v_proj") else 1)

    monkeypatch.setattr(Deltas, "of", wrong)
    assert main(["verify", str(pair / "adapter"), "--base", str(pair / "base")]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        "delta_W of model.decoder.layers.1.self_attn.v_proj: differs by 1.0e-04"
    )


def test_one_wrong_logit_is_found(pair, monkeypatch):
    from randlora_jax.front_ends import linen

    right = linen.HuggingFaceRandLora.__call__

    def wrong(self, **inputs):
        return [right(self, **inputs)[0].at[0, 3, 5].add(1e-3)]

    monkeypatch.setattr(linen.HuggingFaceRandLora, "__call__", wrong)
    report = verify(pair / "adapter", base=pair / "base")
    assert not report.good
    assert report.text.startswith("logits of random tokens: differs by")


def test_tensors_that_peft_does_not_take_are_found(pair, monkeypatch):
    """OPT of this size has no project_out, so PEFT would drop what the file holds of it."""
    from randlora_jax.commands import verify as module

    read = module.read_showing_progress

    def more(directory):
        adapter = read(directory)
        saved = {**adapter.saved, "model.decoder.project_out.weight": np.ones((2, 2), "f")}
        return Adapter(adapter.config, adapter.layers, saved, adapter.bases, adapter.provenance)

    monkeypatch.setattr(module, "read_showing_progress", more)
    report = verify(pair / "adapter", base=pair / "base")
    assert report.data["one_sided"] == ["model.decoder.project_out.weight"]
    assert not report.good


def test_models_without_a_flax_class_say_so(tmp_path, monkeypatch):
    import transformers

    save_base("llama", tmp_path / "base")
    save_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    monkeypatch.delattr(transformers, "FlaxLlamaForCausalLM")
    monkeypatch.setitem(transformers._class_to_module, "FlaxLlamaForCausalLM", "gone")
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert "logits not compared" in report.text
    assert report.text.splitlines()[-1] == "delta_W agrees; logits were not compared"
    assert report.data["logits_compared"] is False and "pip install" not in report.text
    monkeypatch.setattr(transformers, "__version__", "5.24.0")
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert "pip install '.[hf]'" in report.data["note"]


def test_a_flax_class_that_computes_otherwise_says_nothing(tmp_path):
    """Hugging Face's Flax Llama ignores rope_theta."""
    save_base("llama", tmp_path / "base", rope_theta=3.0)
    save_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert report.good
    assert "they are not the same model (rope_theta 3.0" in report.text
    assert report.text.splitlines()[-1] == "delta_W agrees; logits were not compared"


def test_what_transformers_does_not_read_is_said(tmp_path):
    """rope_parameters, which its release 5 writes."""
    asked = {"rope_type": "default", "rope_theta": 5e5}
    save_base("llama", tmp_path / "base", rope_parameters=asked)
    save_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    report = verify(tmp_path / "adapter", base=tmp_path / "base")
    assert report.good and "logits" in kinds(report), "both sides compute with 10000"
    assert report.data["note"].startswith("rope_parameters {")


def test_the_last_lines_are_in_words(pair):
    lines = verify(pair / "adapter", base=pair / "base").text.splitlines()
    assert lines[-1] == "PEFT and randlora-jax agree"
    assert any(line.startswith("delta_W: differs most in model.decoder.") for line in lines)
    assert not any("0.0e+00" in line for line in lines)


def test_what_is_warned_of_is_said_once(tmp_path, capsys):
    """Though the adapter is read for delta_W, and again for the Flax model."""
    save_base("gpt2", tmp_path / "base")
    save_adapter("gpt2", tmp_path / "base", tmp_path / "adapter", bias="all")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    left = {key: x for key, x in load_file(file).items() if not key.endswith("bias")}
    save_file(left, file, {"format": "pt"})
    capsys.readouterr()
    command = ["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--json"]
    assert main(command) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert any(item["kind"] == "logits" for item in report["differences"])
    assert len(report["warnings"]) == 1 and "biases were trained" in report["warnings"][0]
    assert said.err.count("biases were trained") == 1


def test_nan_is_not_agreement():
    ours, theirs = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    assert not difference("", "", ours, theirs, 1.0).good
    assert not difference("", "", theirs, ours, 1.0).good
    assert not difference("", "", ours, np.ones(4, np.float32), 1.0).good


def test_without_pytorch_it_says_what_to_install(pair, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["verify", str(pair / "adapter"), "--base", str(pair / "base")]) == 2
    assert "pip install '.[torch,hf]' in a clone" in capsys.readouterr().err


def test_rounding_that_pefts_own_ways_show_is_no_disagreement(tmp_path, monkeypatch):
    save_base("llama", tmp_path / "base")
    save_adapter("llama", tmp_path / "base", tmp_path / "adapter", randlora_alpha=300)
    monkeypatch.setattr(importlib.import_module("randlora_jax.commands.verify"), "LOGITS", 0.0)
    ways = []
    monkeypatch.setattr(FlaxTwin, "logits_of", keeping(FlaxTwin.logits_of, ways))

    def logits():
        report = verify(tmp_path / "adapter", base=tmp_path / "base")
        (found,) = (d for d in report.data["differences"] if d["kind"] == "logits")
        return found

    found = logits()
    _, peft, merged = ways
    apart = abs(merged - peft).max() / abs(peft).max()
    twins = found["allowed"] - 2 * apart
    assert 0 < apart < 1e-4 and abs(twins) < 1e-9, (found, apart)
    assert found["good"]
    for factor in (1.001, 3.0):
        monkeypatch.setattr(FlaxTwin, "adapted", lambda *_, x=factor * peft: x)
        assert not logits()["good"]


def keeping(method, found):
    def kept(*args):
        found.append(method(*args))
        return found[-1]

    return kept
