"""randlora-jax verify on all kinds of architectures: delta_W at least, a note about the rest."""

import json

import pytest
import torch
import transformers as hf
from families import WIDTHS
from peft_side import save_adapter, save_base, save_both

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

ENCODER = {**WIDTHS, "intermediate_size": 52, "max_position_embeddings": 40}
LLAMA = {**ENCODER, "num_key_value_heads": 1, "head_dim": 12}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 15,
}
SIDES = {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("layers", 1), ("attention_heads", 3), ("ffn_dim", 52))
}
BART = {"vocab_size": 97, "d_model": 36, "max_position_embeddings": 40, **SIDES}
T5 = {"vocab_size": 97, "d_model": 36, "d_kv": 12, "d_ff": 52, "num_layers": 1, "num_heads": 3}


def bart():
    return hf.BartForSequenceClassification(
        hf.BartConfig(**BART, num_labels=3, pad_token_id=1, eos_token_id=2)
    )


def whisper():
    config = hf.WhisperConfig(
        **{key: size for key, size in BART.items() if key != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return hf.WhisperForConditionalGeneration(config)


def llava():
    config = hf.LlavaConfig(
        hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**LLAMA), image_token_index=96
    )
    return hf.LlavaForConditionalGeneration(config)


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=False, **more))


# name: (the model, what the adapter targets, its task, whether logits are compared)
MODELS = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**ENCODER)), ["query"], "FEATURE_EXTRACTION", True),
    "bart": (bart, ["q_proj", "fc1"], "SEQ_CLS", True),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), ["q", "wi"], None, None),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)),
        ["query", "classifier"],
        None,
        False,
    ),
    "whisper": (whisper, ["q_proj", "fc1"], "SEQ_2_SEQ_LM", False),
    "llava": (llava, r".*language_model.*\.(q_proj|down_proj)", "CAUSAL_LM", False),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1)
        ),
        ["w1", "gate", "o_proj"],
        "CAUSAL_LM",
        False,
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=97, hidden_size=36, num_hidden_layers=1, state_size=4)
        ),
        ["in_proj", "x_proj"],
        "CAUSAL_LM",
        False,
    ),
}


def run(folder, capsys, *more):
    """The exit status, and the JSON that is printed."""
    command = ["verify", folder / "adapter", "--base", folder / "base", "--json", *more]
    status = main(list(map(str, command)))
    return status, json.loads(capsys.readouterr().out)


def deltas(said):
    return {x["what"]: x["good"] for x in said["differences"] if x["kind"] == "delta_W"}


def kinds(said):
    return {x["kind"] for x in said["differences"]}


def layers(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "randlora_lambda")
    }


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name, tmp_path, capsys):
    make, target, task, has_logits = MODELS[name]
    whole = {"modules_to_save": ["classification_head"]} if name == "bart" else {}
    model = save_both(make(), tmp_path, target_modules=target, task_type=task, **whole)
    status, said = run(tmp_path, capsys)
    assert status == 0, said
    assert deltas(said).keys() == layers(model)
    assert has_logits is None or ("logits" in kinds(said)) == has_logits
    assert ("logits" in kinds(said)) == (said["note"] == "")
    assert "bare" not in said["note"]


NOWHERE = {"base_model_class": "X", "parent_library": "transformers.models.nope.modeling_nope"}
FUNCTION = {"base_model_class": "rotate_half", "parent_library": "transformers.models.llama"}
LOST = {
    "model type": ({"model_type": "my-model", "architectures": ["MyModel"]}, {}, "MyModel"),
    "class": ({"model_type": "x", "architectures": ["NoSuch"]}, {"task_type": None}, "NoSuch"),
    "no model": ({"model_type": "x", "architectures": ["AutoTokenizer", 3]}, {}, "AutoTokenizer"),
    "nothing": ({"model_type": None, "architectures": None}, {}, "does not open"),
    "other sizes": ({"hidden_size": 24, "head_dim": 8}, {}, "size mismatch|linear layer|Error"),
    "half a model": ({"num_hidden_layers": 1}, {}, "has no linear layer 'model.layers.1"),
    "backbone": ({"vision_config": {"backbone": "someone/model"}}, {}, "backbone"),
}
IN_A_PART = {"part": {"architectures": ["LlamaForCausalLM"]}}
FOUND = {
    "auto_mapping to nowhere": ({}, {"task_type": None, "auto_mapping": NOWHERE}),
    "auto_mapping to a function": ({}, {"task_type": None, "auto_mapping": FUNCTION}),
    "class alone": ({"model_type": None}, {}),
    "class in a part": ({"model_type": None, "architectures": None, **IN_A_PART}, {}),
    "type alone": ({"architectures": ["NoSuch"]}, {}),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return folder, layers(save_both(llama(), folder, **settings))


@pytest.fixture
def changed(pair, tmp_path):
    """A function that copies the pair with other values in the two configurations."""

    def change(base, adapter):
        for part, name, values in (
            ("base", "config.json", base),
            ("adapter", "adapter_config.json", adapter),
        ):
            (tmp_path / part).mkdir()
            for path in (pair[0] / part).iterdir():
                (tmp_path / part / path.name).write_bytes(path.read_bytes())
            config = json.loads((tmp_path / part / name).read_text())
            (tmp_path / part / name).write_text(json.dumps(config | values))
        return tmp_path

    return change


@pytest.mark.parametrize("case", LOST)
def test_a_model_that_transformers_cannot_open(case, pair, changed, capsys):
    base, adapter, message = LOST[case]
    status, said = run(changed(base, adapter), capsys)
    assert status == 0, said
    assert deltas(said).keys() == pair[1] and all(deltas(said).values())
    assert kinds(said) == {"delta_W"}
    assert any(word in said["note"] for word in message.split("|")), said["note"]
    assert "bare" in said["note"]


@pytest.mark.parametrize("case", FOUND)
def test_a_class_is_found_where_one_of_the_two_names_it(case, pair, changed, capsys):
    status, said = run(changed(*FOUND[case]), capsys)
    assert status == 0, said
    assert deltas(said).keys() == pair[1] and said["note"] == ""
    assert "logits" in kinds(said)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("target", ["all-linear", "listed"])
def test_bare_layers_find_what_differs(family, target, tmp_path, monkeypatch, capsys):
    from randlora_jax.interop.numpy_delta import Deltas

    more = {"target_modules": target} if target == "all-linear" else {}
    save_base(family, tmp_path / "base")
    model = save_adapter(family, tmp_path / "base", tmp_path / "adapter", bias="all", **more)
    path = tmp_path / "base/config.json"
    shorter = {"n_layer": 1, "num_hidden_layers": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | shorter))
    status, said = run(tmp_path, capsys)
    assert status == 0, said
    assert deltas(said).keys() == layers(model)
    assert "tensors trained whole not compared" in said["note"] or family == "llama"

    right, one = Deltas.of, min(layers(model))
    monkeypatch.setattr(Deltas, "of", lambda self, x: right(self, x) * (1.0001 if x == one else 1))
    status, said = run(tmp_path, capsys)
    assert status == 1
    assert [what for what, good in deltas(said).items() if not good] == [one]


@pytest.mark.parametrize(
    ("dtype", "kind", "stored"),
    [
        (torch.bfloat16, {}, True),
        (torch.bfloat16, {}, False),
        (torch.bfloat16, {"sparse": True}, False),
        (torch.float16, {}, False),
        (torch.float16, {"sparse": True}, True),
        (torch.float16, {"very_sparse": True}, False),
    ],
    ids=str,
)
def test_low_precision_is_no_false_alarm(dtype, kind, stored, tmp_path, capsys):
    settings = {
        "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
        "save_projection": stored,
    }
    save_both(llama().to(dtype), tmp_path, load=dtype, **settings, **kind)
    status, said = run(tmp_path, capsys)
    assert status == 0, said
    assert kinds(said) == {"delta_W", "trained tensors", "logits"}


def test_low_precision_on_bare_layers(tmp_path, capsys):
    settings = {"target_modules": ["q_proj", "up_proj"], "sparse": True, "save_projection": False}
    save_both(llama().bfloat16(), tmp_path, load=torch.bfloat16, **settings)
    config = json.loads((tmp_path / "base/config.json").read_text())
    unknown = {"model_type": "my", "architectures": ["My"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config | unknown))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["auto_mapping"] = None
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    for told in ((), ("--base-dtype", "float32")):
        status, said = run(tmp_path, capsys, *told)
        assert status == 0 and all(deltas(said).values()) and "bare" in said["note"], said


@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_that_the_flax_class_lacks(bias, tmp_path, capsys):
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "bias": bias}
    save_both(llama(attention_bias=True, mlp_bias=True), tmp_path, **settings)
    status, said = run(tmp_path, capsys)
    assert status == 0, said
    assert kinds(said) == {"delta_W", "trained tensors"}
    assert said["note"].startswith("logits not compared: ")


def test_what_peft_refuses_fails(tmp_path, capsys):
    """An embedding of another size: the base model must be resized before either can use it."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    save_both(llama(), tmp_path, task_type="CAUSAL_LM", **settings)
    llama_of_more = llama()
    llama_of_more.resize_token_embeddings(101)
    llama_of_more.save_pretrained(tmp_path / "base")
    status, said = run(tmp_path, capsys)
    assert status == 1
    assert "LlamaForCausalLM" in said["refused"] and "size mismatch" in said["refused"]
    assert all(deltas(said).values()) and "bare" in said["note"]


def test_a_classifier_that_the_base_model_lacks_has_the_adapters_labels(tmp_path, capsys):
    save_both(bart(), tmp_path, target_modules=["fc1"], modules_to_save=["classification_head"])
    headless = hf.BartModel(hf.BartConfig(**BART))
    headless.load_state_dict(bart().model.state_dict())
    headless.save_pretrained(tmp_path / "base")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    status, said = run(tmp_path, capsys)
    assert status == 0, said
    assert "trained tensors" in kinds(said)
