"""randlora-jax merge, against PyTorch PEFT's merge_and_unload and the unmerged PEFT model."""

import json
import subprocess
import sys

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from families import FAMILIES, twins
from peft_side import assert_same_logits, load, logits, save_adapter, save_base
from randlora_jax.interop.errors import AdapterFileError, TargetError
from safetensors.torch import save_file
from torch_files import load_file

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.commands.main import main
from randlora_jax.commands.merge import merge

pytestmark = pytest.mark.torch


def tensors(folder):
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merged_models_compute_what_peft_does(family, shard, tmp_path):
    base = save_base(family, tmp_path / "base", shard=shard)
    model = save_adapter(family, base, tmp_path / "adapter")
    report = merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    before = logits(load(family, base))
    merged = logits(load(family, tmp_path / "out"))
    assert_same_logits(merged, logits(model), before)
    adapted = len(report.data["layers"])
    expected = model.merge_and_unload()
    assert adapted == sum(1 for k in load_file(tmp_path / "adapter" / WEIGHTS) if "lambda" in k)
    assert_same_logits(merged, logits(expected), before)
    state = expected.state_dict()
    for key, found in tensors(tmp_path / "out").items():
        assert (found - state[key]).abs().max() <= 1e-6 * state[key].abs().max(), key
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (tmp_path / "base").iterdir()}
    index = tmp_path / "out" / "model.safetensors.index.json"
    if index.exists():
        assert index.read_text() == (tmp_path / "base" / index.name).read_text()


WEIGHTS = "adapter_model.safetensors"
EVERYTHING = {
    "bert": {
        "target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"],
        "bias": "all",
        "modules_to_save": ["pooler"],
    },
    "gpt2": {"bias": "randlora_only", "modules_to_save": ["ln_f"]},
    "llama": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize("family", sorted(EVERYTHING))
def test_biases_and_whole_modules_are_merged(family, tmp_path):
    base = save_base(family, tmp_path / "base")
    model = save_adapter(family, base, tmp_path / "adapter", **EVERYTHING[family])
    report = merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    assert report.data["replaced"] and not report.data["added"]
    assert_same_logits(
        logits(load(family, tmp_path / "out")), logits(model), logits(load(family, base))
    )


@pytest.mark.parametrize("nbytes", [1, 3000])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_of_any_size_make_the_same_sums(family, nbytes, tmp_path, monkeypatch):
    base = save_base(family, tmp_path / "base")
    model = save_adapter(family, base, tmp_path / "adapter")
    monkeypatch.setattr("randlora_jax.interop.numpy_delta.BLOCK", nbytes)
    monkeypatch.setattr("randlora_jax.commands.merge.BLOCK", nbytes)
    merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    state = model.merge_and_unload().state_dict()
    for key, found in tensors(tmp_path / "out").items():
        assert (found - state[key]).abs().max() <= 1e-6 * state[key].abs().max(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_half_precision_sums_are_rounded_once(family, dtype, tmp_path):
    base = save_base(family, tmp_path / "base", dtype)
    save_adapter(family, base, tmp_path / "adapter", dtype)
    merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    wide = peft.PeftModel.from_pretrained(load(family, base), tmp_path / "adapter")
    state = wide.merge_and_unload().state_dict()
    off, numbers = 0, 0
    for key, found in tensors(tmp_path / "out").items():
        assert found.dtype == dtype
        exact = state[key]  # in float32, whose own rounding may tip a tie
        off += (found != exact.to(dtype)).sum().item()
        numbers += found.numel()
        nearest = torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 1e-3)
        assert ((found.float() - exact).abs() <= nearest + torch.finfo(dtype).tiny).all(), key
    # of all numbers together: one matrix is so small that two ties are over a thousandth of it
    assert off <= 1e-3 * numbers


@pytest.mark.parametrize("labels, shard", [(2, "5GB"), (3, "20KB")])
def test_a_new_head_is_added_to_a_model_without_one(labels, shard, tmp_path):
    """The base model's class has no prefix in its names, the classifier's has."""
    save_base("bert", tmp_path / "full", num_labels=labels)
    full = load("bert", tmp_path / "full")
    full.bert.save_pretrained(tmp_path / "base", max_shard_size=shard)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))

    def classifier(path):
        return load("bert", path, num_labels=labels)

    model = save_adapter("bert", tmp_path / "base", tmp_path / "adapter", auto=classifier)
    report = merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    assert report.data["added"] == ["classifier.bias", "classifier.weight"]
    assert report.data["config"]["architectures"] == ["BertForSequenceClassification"]
    if shard != "5GB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        state = tensors(tmp_path / "out")
        assert index["weight_map"].keys() == state.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    torch.manual_seed(11)  # other random numbers where something is not loaded
    found, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    assert found.config.num_labels == labels
    with model.disable_adapter():
        before = logits(model)
    model = peft.PeftModel.from_pretrained(classifier(tmp_path / "base"), tmp_path / "adapter")
    assert_same_logits(logits(found.eval()), logits(model.eval()), before)


def test_a_head_of_other_labels_than_the_config_is_refused(tmp_path):
    save_base("bert", tmp_path / "full", num_labels=4)
    load("bert", tmp_path / "full").bert.save_pretrained(tmp_path / "base")
    save_adapter(
        "bert",
        tmp_path / "base",
        tmp_path / "adapter",
        auto=lambda path: load("bert", path, num_labels=3),
    )
    with pytest.raises(TargetError, match="has 4 labels, the adapter's head 3"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    with pytest.raises(TargetError, match=r"classifier\.bias' is F32 \[4\].* carries \[3\]"):
        merge(tmp_path / "adapter", base=tmp_path / "full", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
    ],
)
def test_tied_weights_are_refused_with_the_reason(changes, tmp_path):
    base = save_base("opt", tmp_path / "base")
    save_adapter("opt", base, tmp_path / "adapter", **changes)
    with pytest.raises(TargetError, match=r"shares its weight with .* change that too"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_weights_untied_are_merged(tmp_path):
    base = save_base("opt", tmp_path / "base", tie_word_embeddings=False)
    model = save_adapter("opt", base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    found = logits(load("opt", tmp_path / "out"))
    assert_same_logits(found, logits(model), logits(load("opt", base)))


def test_an_adapter_without_bases(tmp_path):
    base = save_base("llama", tmp_path / "base")
    model = save_adapter("llama", base, tmp_path / "adapter", save_projection=False)
    with pytest.warns(UserWarning, match="--torch-generation chooses"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    before = logits(load("llama", base))
    assert_same_logits(logits(load("llama", tmp_path / "out")), logits(model), before)
    old = {"out": tmp_path / "old", "torch_generation": "bf16-8bit"}
    merge(tmp_path / "adapter", base=tmp_path / "base", **old)
    assert np.abs(logits(load("llama", tmp_path / "old")) - logits(model)).max() > 1e-2


@pytest.mark.parametrize("inner, prefix", [("transformer", "transformer."), (None, "")])
def test_names_with_and_without_the_prefix(inner, prefix, tmp_path):
    """An adapter of one class, a checkpoint of the other; merged names stay the checkpoint's."""
    base = save_base("gpt2", tmp_path / "base")
    if inner:  # a checkpoint of GPT2Model
        load("gpt2", base).transformer.save_pretrained(tmp_path / "ckpt")
        model = save_adapter("gpt2", base, tmp_path / "adapter")
    else:  # an adapter of GPT2Model
        load("gpt2", base).save_pretrained(tmp_path / "ckpt")
        save_adapter(
            "gpt2",
            base,
            tmp_path / "adapter",
            auto=transformers.AutoModel.from_pretrained,
            task_type="FEATURE_EXTRACTION",
        )
        model = load("gpt2", base)
        model.transformer = peft.PeftModel.from_pretrained(
            model.transformer, tmp_path / "adapter"
        ).merge_and_unload()
    merge(tmp_path / "adapter", base=tmp_path / "ckpt", out=tmp_path / "out")
    found = logits(load("gpt2", tmp_path / "out"))
    assert_same_logits(found, logits(model), logits(load("gpt2", base)))
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "ckpt").keys()


def test_an_adapter_of_ours(tmp_path):
    pair = twins("gpt2", tmp_path / "base")
    config = RandLoraConfig(r=7, randlora_alpha=14, target_modules=FAMILIES["gpt2"][2])
    ours = get_peft_model(pair.flax, config)
    noise = np.random.default_rng(0)
    move = lambda x: x + noise.normal(0, 0.3, x.shape).astype("f")  # noqa: E731
    ours.params = {**ours.params, "randlora": jax.tree.map(move, ours.params["randlora"])}
    ours.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    found = pair.torch_logits(load("gpt2", tmp_path / "out"))
    assert_same_logits(found, pair.flax_logits(ours), pair.torch_logits())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base model and an adapter that nobody changes."""
    folder = tmp_path_factory.mktemp("pair")
    save_base("llama", folder / "base")
    save_adapter("llama", folder / "base", folder / "adapter")
    return folder


def run(pair, out, *more, base=None):
    return main(
        ["merge", str(pair / "adapter"), "--base", str(base or pair / "base"), str(out), *more]
    )


def test_other_files_are_kept_and_other_weights_are_not(pair, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    for path in (pair / "base").iterdir():
        (base / path.name).symlink_to(path)  # as the hub's cache has them
    kept = {"tokenizer.json", "README.md", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    kept |= {"training_args.bin", "linked/prompt.txt"}
    stale = {"pytorch_model.bin", "model.onnx", "onnx/model.onnx", "q4.gguf", "adapter_config.json"}
    stale |= {"rust_model.ot", "64.tflite", "weights.npz", "model.bin", "ggml-model-q4_0.bin"}
    stale |= {"optimizer.pt", "rng_state.pth", "pytorch_model.old", "model.safetensors.part"}
    stale |= {"original/consolidated.00.pth", "original/params.json", "metal/model.bin"}
    stale |= {
        "checkpoint-5/model.safetensors",
        "checkpoint-5/optimizer.pt",
        "mp/consolidated.0.pth",
    }
    stale |= {"coreml/text/weights/weight.bin", "Model.mlpackage/Data/model.mil"}
    (tmp_path / "elsewhere").mkdir()
    (base / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "elsewhere")  # as links may
    for name in kept | stale:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    assert run(pair, tmp_path / "out", "--json", base=base) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["left_out"]) == stale
    found = {
        str(path.relative_to(tmp_path / "out"))
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == kept | {path.name for path in (pair / "base").iterdir()}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == "1_Pooling/config.json"


def test_nothing_is_overwritten_without_force(pair, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(pair, out) == 0
    (out / "config.json").write_text("mine")
    (out / "model-00007-of-00009.safetensors").write_text("an old shard")
    (out / "notes.txt").write_text("mine")
    assert run(pair, out) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "mine"
    assert run(pair, out, "--force") == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(path.name for path in (pair / "base").iterdir()), "notes.txt"]
    )
    load("llama", out)


def test_places_that_would_mislead_are_refused(pair, tmp_path, capsys):
    for out in (pair / "base", pair / "base" / "inside"):
        assert run(pair, out, "--force") == 2
        assert "is the base model or inside it" in capsys.readouterr().err
    assert run(pair, pair / "adapter", "--force") == 2
    assert "transformers would load on top" in capsys.readouterr().err


def test_sums_beyond_the_dtype_are_refused(tmp_path):
    save_base("bert", tmp_path / "base", torch.float16)
    save_adapter("bert", tmp_path / "base", tmp_path / "adapter", randlora_alpha=10**7)
    with pytest.raises(AdapterFileError, match="beyond float16"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_model_is_refused(pair, tmp_path):
    save_base("llama", tmp_path / "wide", intermediate_size=56)
    with pytest.raises(AdapterFileError, match="another base model"):
        merge(pair / "adapter", base=tmp_path / "wide", out=tmp_path / "out")
    save_base("llama", tmp_path / "narrow", hidden_size=30)
    with pytest.raises(TargetError, match="smaller side is 36: another base model"):
        merge(pair / "adapter", base=tmp_path / "narrow", out=tmp_path / "out")
    save_base("gpt2", tmp_path / "gpt2")
    with pytest.raises(TargetError, match=r"has no tensor 'model\.layers\.0"):
        merge(pair / "adapter", base=tmp_path / "gpt2", out=tmp_path / "out")


def test_conv1d_of_an_unknown_kind_is_refused(tmp_path):
    base = save_base("gpt2", tmp_path / "base")
    save_adapter("gpt2", base, tmp_path / "adapter")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"gpt2"', '"gpt2-of-my-own"'))
    with pytest.raises(TargetError, match="Which side is in cannot be told"):
        merge(tmp_path / "adapter", base=tmp_path / "base", out=tmp_path / "out")


def test_quantised_bases_are_refused(pair, tmp_path):
    merge(pair / "adapter", base=pair / "base", out=tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, key: state[key].to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(TargetError, match=r"up_proj\.weight.*found I8.*dequantised first"):
        merge(pair / "adapter", base=tmp_path / "base", out=tmp_path / "out")


def test_two_tensors_for_one_place_are_refused(pair, tmp_path):
    from randlora_jax.interop.base_model import BaseModel
    from randlora_jax.interop.keys import trained_tensors
    from randlora_jax.interop.numpy_delta import Deltas
    from randlora_jax.interop.peft_dir import read_adapter

    adapter = read_adapter(pair / "adapter")
    bias = np.zeros(3, np.float32)
    adapter.saved |= {"a.bias": bias, "a.base_layer.bias": bias}
    with pytest.raises(AdapterFileError, match="twice"):
        trained_tensors(adapter.saved)
    name = next(iter(adapter.layers))
    adapter.layers[name.removeprefix("model.")] = adapter.layers[name]
    with BaseModel(pair / "base") as base, pytest.raises(TargetError, match="weight of both"):
        Deltas(adapter, base)


def test_no_framework_is_imported(pair, tmp_path):
    code = (
        "import sys; from randlora_jax.commands.main import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'jax', 'torch', 'transformers', 'peft', 'flax'} & sys.modules.keys()"
    )
    command = ["merge", pair / "adapter", "--base", pair / "base", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", code, *map(str, command)], check=True)
