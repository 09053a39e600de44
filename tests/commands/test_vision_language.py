"""Every command on models with vision and language, whose files have names of their own."""

import json

import peft
import pytest
import torch
import transformers
from peft_side import randomise
from randlora_jax.interop.base_model import BaseModel
from safetensors.torch import save_file
from torch_files import load_file
from vision_language import model

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

IDS = torch.arange(9)[None] + 5
TARGETS = ["q_proj", "v_proj", "fc1", "linear_1", "down_proj", "qkv"]
FILE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
PREFIX = "base_model.model."


def reopened(folder, family):
    return type(model(family)).from_pretrained(folder).eval()


def adapted(family, folder, **settings):
    """A PEFT adapter over a saved model, every number of it random."""
    base = reopened(folder / "base", family)
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    targets = [name for name in TARGETS if name in names]
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=targets, **settings)
    found = peft.get_peft_model(base, config).eval()
    randomise(found)
    found.save_pretrained(folder / "adapter")
    return found


def rename_as_stored(folder):
    """Give an adapter the names of classes before transformers 4.52, which are the files'."""
    file = folder / "adapter" / ADAPTER
    tensors = load_file(file)
    keys = {key: key.removeprefix(PREFIX).rpartition(".")[::2] for key in tensors}
    layers = {name for key, (name, _) in keys.items() if key.startswith(PREFIX)}
    with BaseModel(folder / "base") as base:
        base.names.fit(layers)
        older = {name: base.layer(name).stored.key.removesuffix(".weight") for name in layers}
    renamed = {
        f"{PREFIX}{older[name]}.{part}" if name in older else key: tensors[key]
        for key, (name, part) in keys.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})


def run(name, folder, *more):
    out = [] if name == "inspect" else [folder / name]
    command = [name, folder / "adapter", "--base", folder / "base", *out, *more]
    assert main([*map(str, command)]) == 0
    return folder / name


def logits(found):
    with torch.no_grad():
        return found(input_ids=IDS).logits


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "family, older",
    [("llava", False), ("llava", True), ("qwen2_vl", False), ("qwen2_vl", True)]
    + [(family, False) for family in ("gemma3", "paligemma", "mistral3")],
)
def test_merged_models_are_those_of_peft(family, older, tmp_path, capsys):
    model(family).save_pretrained(tmp_path / "base")
    expected = adapted(family, tmp_path).merge_and_unload().state_dict()
    if older:
        rename_as_stored(tmp_path)
    run("inspect", tmp_path, "--json")
    kinds = json.loads(capsys.readouterr().out)["layers"]
    assert all(kind["shape"] for kind in kinds)
    merged = run("merge", tmp_path)
    before, after = (load_file(folder / FILE) for folder in (tmp_path / "base", merged))
    assert before.keys() == after.keys()
    found = reopened(merged, family).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), key


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_what_is_made_of_adapters_opens_in_peft(family, older, tmp_path):
    """In today's class, also where the adapter has the names of an older one, as PEFT opens it."""
    model(family).save_pretrained(tmp_path / "base")
    expected = logits(adapted(family, tmp_path, save_projection=False))
    if older:
        rename_as_stored(tmp_path)
    assert main(["compact", str(tmp_path / "adapter"), str(tmp_path / "compact")]) == 0
    base = reopened(tmp_path / "base", family)
    compacted = peft.PeftModel.from_pretrained(base, tmp_path / "compact").eval()
    assert_same(logits(compacted), expected)
    assert (expected - logits(reopened(tmp_path / "base", family))).abs().max() > 1e-2
    generation = ["--torch-generation", "bf16-24bit"]
    rank = "8" if older else "99"  # layers of several ranks are told apart by their whole names
    for name, more in {"to-lora": ["--rank", rank], "convert": ["--to", "torch"]}.items():
        out = run(name, tmp_path, *more, *generation)
        base = reopened(tmp_path / "base", family)
        found = logits(peft.PeftModel.from_pretrained(base, out).eval())
        if name == "convert" or not older:
            assert_same(found, expected)


def test_a_head_trained_whole_takes_the_place_of_the_files(tmp_path):
    model("llava").save_pretrained(tmp_path / "base")
    expected = adapted("llava", tmp_path, modules_to_save=["lm_head"]).merge_and_unload()
    merged = run("merge", tmp_path)
    head = load_file(merged / FILE)["language_model.lm_head.weight"]
    assert torch.equal(head, expected.lm_head.weight)
    assert_same(logits(reopened(merged, "llava")), logits(expected))


def test_a_classifier_is_added_to_a_model_that_generates(tmp_path):
    model("gemma3").save_pretrained(tmp_path / "base")
    kind = transformers.Gemma3ForSequenceClassification
    base = kind.from_pretrained(tmp_path / "base").eval()
    targets = {"target_modules": ["q_proj", "fc1"], "task_type": "SEQ_CLS"}
    found = peft.get_peft_model(base, peft.RandLoraConfig(r=5, randlora_alpha=10, **targets))
    randomise(found)
    found.eval().save_pretrained(tmp_path / "adapter")
    expected = logits(found.merge_and_unload())
    merged = run("merge", tmp_path)
    assert json.loads((merged / "config.json").read_text())["architectures"] == [kind.__name__]
    assert_same(logits(kind.from_pretrained(merged).eval()), expected)
