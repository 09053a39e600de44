"""Every command holds an adapter's config, its tensors and its base model against each other."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from families import WIDTHS
from peft_nets import CONFIG, WEIGHTS, change_config, jax_adapter, rewrite, without
from peft_side import load, randomise, save_adapter, save_base
from randlora_jax.interop.peft_dir import write_adapter
from safetensors.numpy import load_file, save_file

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

WITH_BASE = {
    "inspect": ["inspect", "{adapter}", "--base", "{base}"],
    "merge": ["merge", "{adapter}", "--base", "{base}", "{out}"],
    "to-lora": ["to-lora", "{adapter}", "--base", "{base}", "{out}", "--rank", "99"],
    "verify": ["verify", "{adapter}", "--base", "{base}"],
}
ALONE = {
    "inspect alone": ["inspect", "{adapter}"],
    "compact": ["compact", "{adapter}", "{out}"],
    "convert": ["convert", "{adapter}", "{out}", "--to", "torch", "--names", "{rules}"],
}
COMMANDS = WITH_BASE | ALONE
QUICK = [command for command in COMMANDS if command != "verify"]  # where they come to their end


def ask(folder, command, capsys):
    """Exit status, and all that was said."""
    (folder / "rules.json").write_text('{"(.*)": "net.\\\\1"}')
    names = {"adapter": "adapter", "base": "base", "out": "out", "rules": "rules.json"}
    paths = {key: str(folder / name) for key, name in names.items()}
    status = main([part.format(**paths) for part in COMMANDS[command]])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def refused(folder, command, capsys, *words) -> None:
    status, said = ask(folder, command, capsys)
    assert status == 1, said
    assert all(word in said for word in words), said
    assert not (folder / "out").exists()


def change_model(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def bert(tmp_path, request):
    save_base("bert", tmp_path / "base")
    settings = {"target_modules": ["query", "value"], "bias": getattr(request, "param", "none")}
    save_adapter("bert", tmp_path / "base", tmp_path / "adapter", **settings)
    return tmp_path


all_biases = pytest.mark.parametrize("bert", ["all"], indirect=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_head_that_the_file_lost(bert, command, capsys):
    rewrite(bert / "adapter", without("classifier"))
    refused(bert, command, capsys, "classifier", "task_type='SEQ_CLS'")


@pytest.mark.parametrize("command", WITH_BASE)
@pytest.mark.parametrize("lost", ["classifier.bias", "classifier.weight"])
def test_half_a_head(bert, command, lost, capsys):
    rewrite(bert / "adapter", without(lost))
    refused(bert, command, capsys, f"expected '{lost}'")


@all_biases
@pytest.mark.parametrize("command", QUICK)
def test_biases_that_the_file_never_had(bert, command, capsys):
    """As PEFT before 0.21 wrote it: going on, and saying so."""
    rewrite(
        bert / "adapter",
        lambda t: {k: x for k, x in t.items() if k[-5:] != ".bias" or "classifier" in k},
    )
    status, said = ask(bert, command, capsys)
    assert status == 0, said
    (line,) = (line for line in said.splitlines() if line.startswith("randlora-jax: warning"))
    assert "bias='all' says that biases were trained, and the file has none" in line


@all_biases
@pytest.mark.parametrize("command", WITH_BASE)
def test_a_bias_that_the_file_lost(bert, command, capsys):
    rewrite(bert / "adapter", without("layer.1.output.LayerNorm.bias"))
    refused(bert, command, capsys, "expected 'bert.encoder.layer.1.output.LayerNorm.bias'")


@pytest.mark.parametrize("command", COMMANDS)
def test_targets_that_are_narrower_than_the_tensors(bert, command, capsys):
    change_config(bert / "adapter", target_modules=["query"])
    refused(bert, command, capsys, "target_modules=('query',)", "attention.self.value")


@pytest.mark.parametrize("command", WITH_BASE)
@pytest.mark.parametrize("lost", ["layer.1.attention.self.value.", "self.value."])
def test_targets_that_are_wider_than_the_tensors(bert, command, lost, capsys):
    rewrite(bert / "adapter", without(lost))
    refused(bert, command, capsys, "encoder.layer.1.attention.self.value'", "target_modules")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_field_that_changes_the_update(bert, command, capsys):
    change_config(bert / "adapter", use_dora=True)
    refused(bert, command, capsys, "use_dora", CONFIG)
    if command in QUICK:
        change_config(bert / "adapter", use_dora=False)
        assert ask(bert, command, capsys)[0] == 0


def test_a_base_model_that_has_more_than_the_adapters_class(tmp_path, capsys):
    """A classifier on a checkpoint made for pretraining, whose head the targets would take, too."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**WIDTHS, intermediate_size=52, max_position_embeddings=40)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "base")
    save_adapter("bert", tmp_path / "base", tmp_path / "adapter", target_modules=["dense"])
    for command in ("inspect", "to-lora", "inspect alone"):
        status, said = ask(tmp_path, command, capsys)
        assert (status, "warning" in said) == (0, False), said
    rewrite(tmp_path / "adapter", without("layer.0.output.dense.randlora_"))
    (tmp_path / "out").rename(tmp_path / "lora")
    refused(tmp_path, "inspect", capsys, "expected tensors of 'bert.encoder.layer.0.output.dense'")


@pytest.mark.parametrize("command", WITH_BASE)
def test_a_head_that_the_checkpoint_does_not_hold_either(tmp_path, command, capsys):
    """PEFT trains a copy of a tied one, and refuses the file without it."""
    base = save_base("opt", tmp_path / "base")
    save_adapter("opt", base, tmp_path / "adapter", modules_to_save=["lm_head"])
    rewrite(tmp_path / "adapter", without("lm_head"))
    with pytest.raises(KeyError, match="lm_head"):
        peft.PeftModel.from_pretrained(load("opt", base), tmp_path / "adapter")
    refused(tmp_path, command, capsys, "expected tensors of 'lm_head'", "modules_to_save")


KEPT = {
    "layers": ({"target_modules": ["query", "dense"]}, "'bert.pooler.dense'"),
    "biases": ({"target_modules": ["query"], "bias": "all"}, "'cls.seq_relationship.bias'"),
    "a module": (
        {"target_modules": ["query"], "modules_to_save": ["cls"]},
        "'cls.seq_relationship.weight'",
    ),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_a_checkpoint_keeps_and_its_class_does_not_read(tmp_path, kept, capsys):
    """As bert-base-uncased: saved after pretraining, and said to be of the class for masked words.

    PEFT adapts what that class has.
    """
    settings, named = KEPT[kept]
    torch.manual_seed(0)
    config = transformers.BertConfig(**WIDTHS, intermediate_size=52, max_position_embeddings=40)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "base")
    change_model(tmp_path / "base", architectures=["BertForMaskedLM"])
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, peft.RandLoraConfig(r=5, **settings))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    status, said = ask(tmp_path, "inspect", capsys)
    assert (status, said.count("randlora-jax: warning")) == (0, 1), said
    assert named in said and "the adapter has nothing for it" in said
    if kept != "a module":  # tied, and so not merged
        assert ask(tmp_path, "merge", capsys)[0] == 0
        expected = model.merge_and_unload().state_dict()
        for key, x in load_file(tmp_path / "out/model.safetensors").items():
            if key in expected:
                right = expected[key].numpy()
                assert np.abs(x - right).max() <= 1e-6 * np.abs(right).max(), key
    rewrite(tmp_path / "adapter", without("layer.0.attention.self.query"))
    status, said = ask(tmp_path, "inspect", capsys)
    assert status == 1 and "layer.0.attention.self.query" in said, said


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("extra", ["mtp.layers.0", "model.layers.2"])
def test_layers_that_predict_more_tokens(tmp_path, extra, bias, capsys):
    """As in files of Qwen3-Next; and of GLM-4, behind the last layer, with a tower of vision."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WIDTHS, intermediate_size=52, attention_bias=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    change_model(tmp_path / "base", vision_config={"depth": 5})
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0."
    more = {k.replace(layer, f"{extra}."): x for k, x in tensors.items() if k.startswith(layer)}
    save_file(tensors | more, file, {"format": "pt"})
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = {"r": 5, "target_modules": ["q_proj"], "bias": bias, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.RandLoraConfig(**settings))
    model.save_pretrained(tmp_path / "adapter")
    status, said = ask(tmp_path, "merge", capsys)
    assert status == 0 and f"'{extra}.self_attn.q_proj" in said, said
    rewrite(tmp_path / "adapter", without("layers.1.self_attn.q_proj.randlora_"))
    (tmp_path / "out").rename(tmp_path / "merged")
    refused(tmp_path, "merge", capsys, "expected ", "'model.layers.1.self_attn.q_proj")


def test_a_checkpoint_without_the_prefix(tmp_path, capsys):
    """The names of what is missing are told as the adapter has them."""
    config = transformers.BertConfig(
        **WIDTHS, intermediate_size=52, max_position_embeddings=40, num_labels=3
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    settings = {
        "target_modules": r"bert\.encoder\..*\.(query|value)",
        "modules_to_save": ["pooler"],
    }
    save_adapter("bert", tmp_path / "base", tmp_path / "adapter", **settings)
    assert ask(tmp_path, "inspect", capsys)[0] == 0
    whole = load_file(tmp_path / "adapter" / WEIGHTS)
    for lost in ("bert.encoder.layer.1.attention.self.query", "bert.pooler.dense.bias"):
        save_file(without(lost)(whole), tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
        refused(tmp_path, "inspect", capsys, f"'{lost}'")


# --- written targets ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(7)
    config = transformers.MixtralConfig(
        **WIDTHS,
        intermediate_size=52,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=40,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "base")
    return folder


def peft_adapter(folder, **settings):
    """Saved by PEFT; the weights with it merged in."""
    base = transformers.MixtralForCausalLM.from_pretrained(folder / "base")
    shared = {"r": 5, "randlora_alpha": 10, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, peft.RandLoraConfig(**shared, **settings))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload().state_dict()


def weights_of(folder, command):
    """What a command's output computes; as PEFT opens it where it is an adapter."""
    if command == "merge":
        return {k: torch.tensor(x) for k, x in load_file(folder / "out/model.safetensors").items()}
    base = transformers.MixtralForCausalLM.from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, folder / "out").merge_and_unload().state_dict()


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        torch.testing.assert_close(found[key], x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("command", ["compact", "to-lora", "merge"])
@pytest.mark.parametrize("older", [False, True])
def test_layers_of_experts_are_written_in_full(mixtral, tmp_path, command, older, capsys):
    """PEFT 0.19 and 0.20 read layers_to_transform differently; nothing is left to read."""
    (tmp_path / "base").symlink_to(mixtral / "base")
    given = {"target_modules": ["w1", "w2"], "layers_to_transform": [1]}
    if older:  # what was trained in 0.19, where 1 is an expert
        expected = peft_adapter(tmp_path, target_modules=r".*experts\.1\.w[12]")
        change_config(tmp_path / "adapter", **given)
    else:
        expected = peft_adapter(tmp_path, **given, layers_pattern="layers")
    status, said = ask(tmp_path, command, capsys)
    assert status == 0, said
    assert ("up to 0.19" in said) == older
    assert_same_weights(weights_of(tmp_path, command), expected)
    if command != "merge":
        written = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert written["layers_to_transform"] is None and written["layers_pattern"] is None
        names = written["target_modules"]
        if command == "to-lora":
            assert isinstance(names, list)  # of ends, as programs that know no expressions ask for
        else:
            assert names.count("|") == (3 if older else 5)


# --- metadata -------------------------------------------------------------------------------------

RECORDS = {
    "digest": ["zz", "", "A" * 64, "a" * 63, "é" * 64],
    "kind": ["Dense", "", "rademacher"],
    "source": ["", "Jax", "jaxx", "numpy", "torchvision"],
    "projection_prng_key": [2**64, -(2**63) - 1],
    "shapes": [{"layer.2": [10]}, {"layer.2": [10, 0]}, {"layer.2": [10, True]}, [], {"x": [1, 1]}],
}


@pytest.mark.parametrize("field", RECORDS)
@pytest.mark.parametrize("command", ["inspect", "compact"])
def test_metadata_that_we_cannot_have_written(tmp_path, capsys, field, command):
    write_adapter(tmp_path / "src", jax_adapter(np.random.default_rng(0)))
    raw = (tmp_path / "src" / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    tensors = load_file(tmp_path / "src" / WEIGHTS)
    record = json.loads(header["__metadata__"]["randlora_jax"])
    line = [command, str(tmp_path / "src"), *([str(tmp_path / "out")] if "com" in command else [])]
    for value in RECORDS[field]:
        text = json.dumps(record | {field: value})
        save_file(tensors, tmp_path / "src" / WEIGHTS, {"format": "pt", "randlora_jax": text})
        for more in ([], ["--json"]):
            assert main([*line, *more]) == 1
            assert field in capsys.readouterr().err


def test_bases_that_only_the_metadata_has(tmp_path, capsys):
    write_adapter(tmp_path / "src", jax_adapter(np.random.default_rng(0)))
    raw = (tmp_path / "src" / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = without("randlora_A", "randlora_B")(load_file(tmp_path / "src" / WEIGHTS))
    save_file(tensors, tmp_path / "src" / WEIGHTS, header["__metadata__"])
    assert main(["inspect", str(tmp_path / "src")]) == 1
    assert "expected bases in the file" in capsys.readouterr().err
