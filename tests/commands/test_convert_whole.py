"""Modules trained whole keep their names, or get others, as PEFT and we read them."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers as T
from peft_side import randomise
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.peft_dir import read_adapter, read_files, write_adapter

from randlora_jax import RandLoraModel
from randlora_jax.commands import convert
from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

WIDE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT = WIDE | {"vocab_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64}
BART = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40}
BART |= {"decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
T5 = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
T5 |= {"decoder_start_token_id": 0, "eos_token_id": 2}
VIT = {"image_size": 8, "patch_size": 4, "num_attention_heads": 4, "num_labels": 4}


def llama():
    config = T.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=False)
    return T.LlamaForCausalLM(config)


QUERIES = {r"enc/(\d+)/q": r"{}.encoder.layer.\1.attention.self.query"}
ALL = {r"net/(.*)": r"\1"}  # backwards, whatever has a name


def queries(model):
    return {path: name.format(model) for path, name in QUERIES.items()}


MODELS = {
    "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**TEXT, num_labels=4)),
    "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=4)),
    "mlm": lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)),
    "llama": llama,
    "bart": lambda: T.BartForSequenceClassification(
        T.BartConfig(**BART, vocab_size=96, num_labels=4, eos_token_id=2)
    ),
    "t5": lambda: T.T5ForSequenceClassification(T.T5Config(**T5, num_labels=4)),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**WIDE, **VIT)),
    "distilbert": lambda: T.DistilBertForSequenceClassification(
        T.DistilBertConfig(dim=24, hidden_dim=40, n_layers=1, n_heads=4, vocab_size=96)
    ),
}
MLM = {"target_modules": ["query"], "modules_to_save": ["cls"]}
HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query"]}
OWN = {"task_type": "SEQ_CLS", "modules_to_save": ["classification_head"]}
# model, settings, rules
CASES = {
    "a head of two layers": ("roberta", HEAD, queries("roberta")),
    "its parts renamed": ("roberta", HEAD, {r"Dense_(dense|out_proj)": r"classifier.\1"}),
    "all renamed": ("roberta", HEAD, ALL),
    "a task's head renamed": ("bert", HEAD, {"Dense_1": "classifier"}),
    "a suffix renamed": ("distilbert", HEAD | {"target_modules": ["q_lin"]}, {
        "pre": "pre_classifier", "post": "classifier"
    }),
    "all biases": ("bert", HEAD | {"bias": "all"}, ALL),
    "biases of layers": ("bert", HEAD | {"bias": "randlora_only"}, {"Dense_1": "classifier"}),
    "an adapted head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, ALL),
    "an adapted head renamed": ("llama", {"target_modules": ["q_proj", "lm_head"]}, {
        "out": "lm_head"
    }),
    "more tokens": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, ALL),
    **{
        f"a parameter of the module's own, bias={bias}, {how}": ("mlm", MLM | {"bias": bias}, rules)
        for bias in ("none", "all", "randlora_only")
        for how, rules in {
            "queries": queries("bert"),
            "all": ALL,
            "parts": {r"mlm/(.*)": r"cls.predictions.\1", "mlm": "cls.predictions"},
        }.items()
    },
    "bart": ("bart", OWN | {"target_modules": ["q_proj"]}, ALL),
    "bart renamed": ("bart", OWN | {"target_modules": ["q_proj"]}, {
        r"x/(\w+)": r"classification_head.\1"
    }),
    "t5": ("t5", OWN | {"target_modules": ["q"]}, {r"head/(\w+)": r"classification_head.\1"}),
    "vit": ("vit", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, {
        "Dense_0": "classifier"
    }),
}  # fmt: skip


def outputs(model):
    if "vit" in type(model.base_model.model).__name__.lower():
        given = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)}
    else:
        ids = torch.arange(3, 12)[None]
        given = {"input_ids": torch.cat([ids, torch.full((1, 1), 2)], 1)}
    with torch.no_grad():
        return model.eval()(**given).logits


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path, capsys):
    name, settings, rules = CASES[case]
    torch.manual_seed(1)
    made = MODELS[name]()
    made.save_pretrained(tmp_path / "base")

    def base():
        model = type(made).from_pretrained(tmp_path / "base")
        if case == "more tokens":  # PEFT writes both embeddings unasked
            model.resize_token_embeddings(100)
        return model

    config = peft.RandLoraConfig(r=5, randlora_alpha=10, **settings)
    model = peft.get_peft_model(base(), config)
    start = outputs(model)
    randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    expected = outputs(model)
    assert (expected - start).abs().max() > 1e-3

    (tmp_path / "rules.json").write_text(json.dumps(rules))
    paths = {x: str(tmp_path / x) for x in ("theirs", "ours", "back", "rules.json")}
    more = ["--names", paths["rules.json"]]
    assert main(["convert", paths["theirs"], paths["ours"], "--to", "jax", *more]) == 0
    assert main(["convert", paths["ours"], paths["back"], "--to", "torch", *more]) == 0
    for folder in ("ours", "back"):
        assert main(["inspect", paths[folder]]) == 0
    assert "Warning" not in capsys.readouterr().err
    again = peft.PeftModel.from_pretrained(base(), paths["back"])
    assert torch.equal(outputs(again), expected)
    assert read_adapter(paths["back"]).saved.keys() == {
        key for key in read_files(paths["theirs"]).saved if ".original_module." not in key
    }


@pytest.mark.parametrize("new", [r"classifier.\\1", r"layers.\\1.score"])
def test_layers_by_the_name_of_a_head_are_refused(new, tmp_path, capsys):
    """PEFT would train them whole, as the head of the task."""
    model = peft.get_peft_model(MODELS["bert"](), peft.RandLoraConfig(r=5, **HEAD))
    model.save_pretrained(tmp_path / "theirs")
    rules = tmp_path / "rules.json"
    rules.write_text(f'{{"bert/encoder/layer/(.)/attention/self/query": "{new}"}}')
    paths = [str(tmp_path / x) for x in ("theirs", "out")]
    assert main(["convert", *paths, "--to", "torch", "--names", str(rules)]) == 2
    said = capsys.readouterr().err
    assert "PEFT would train" in said and "whose path ends so" in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    """What `convert` wrote of such modules once."""
    model = peft.get_peft_model(MODELS["mlm"](), peft.RandLoraConfig(r=5, **MLM))
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    inner = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    wrong = {"modules_to_save": inner}, {"target_modules": ("key",)}
    for change, named in zip(wrong, ("predictions.bias", "attention.self.query"), strict=True):
        changed = replace(adapter, config=replace(adapter.config, **change))
        with pytest.raises(AdapterFileError, match=named):
            write_adapter(tmp_path / "out", changed)
        assert not (tmp_path / "out").exists()


def test_a_loss_that_only_promises_tell_is_no_output_either(tmp_path, capsys, monkeypatch):
    model = peft.get_peft_model(MODELS["bert"](), peft.RandLoraConfig(r=5, **HEAD))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "rules.json").write_text(json.dumps({"classifier": "top"}))
    command = ["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--to", "torch"]
    monkeypatch.setattr(convert, "written_modules", lambda *given: ["top", "other"])
    assert main([*command, "--names", str(tmp_path / "rules.json")]) == 1
    assert "as it would be written: expected tensors of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["an adapted head", "a head of two layers"])
def test_the_same_where_a_model_saves(case, tmp_path):
    name, settings, _ = CASES[case]
    made = MODELS[name]()
    made.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(made, peft.RandLoraConfig(r=5, randlora_alpha=10, **settings))
    randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    flax = getattr(T, f"Flax{type(made).__name__}").from_pretrained(tmp_path / "base", from_pt=True)
    ours = RandLoraModel.from_pretrained(flax, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert read_adapter(tmp_path / "ours").saved
    base = type(made).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert torch.equal(outputs(again), outputs(model))
