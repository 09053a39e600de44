"""Base models as people have them: leftovers beside them, parts missing, scalars, tied weights."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers as T
from peft_side import load, logits, randomise, save_adapter, save_base
from safetensors.torch import save_file
from torch_files import load_file

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
WIDE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def adapt(model, folder, save=None, **settings):
    """A saved model and a PEFT adapter over it, every trained number random."""
    model.save_pretrained(folder / "base")
    config = peft.RandLoraConfig(**{"r": 5, "randlora_alpha": 10, **settings})
    found = peft.get_peft_model(model.eval(), config)
    randomise(found)
    found.save_pretrained(folder / "adapter", **(save or {}))
    return found


def run(name, folder, *more):
    out = [] if name in ("inspect", "verify") else [folder / name]
    command = [name, folder / "adapter", "--base", folder / "base", *out, *more]
    return main([*map(str, command)])


def assert_merged(folder, expected):
    """The merged file has PEFT's numbers under the base model's keys."""
    found = load_file(folder / "merge" / FILE)
    base = load_file(folder / "base" / FILE)
    assert found.keys() == base.keys()
    for key, tensor in found.items():
        assert tensor.shape == base[key].shape and tensor.dtype == base[key].dtype, key
        assert (tensor - expected[key]).abs().max() <= 1e-6 * expected[key].abs().max(), key


def test_the_file_that_transformers_loads_is_merged_into(tmp_path):
    base = save_base("llama", tmp_path / "base", shard="20KB")
    other = save_base("llama", tmp_path / "other", rms_norm_eps=1e-5)
    model = load("llama", other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "base", max_shard_size="5GB")
    shutil.copytree(base, tmp_path / "again")
    save_base("llama", tmp_path / "base", shard="20KB")  # over it, as in a second save
    model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / FILE, tmp_path / "base" / FILE)
    assert (tmp_path / "base" / INDEX).exists()
    expected = save_adapter("llama", base, tmp_path / "adapter").merge_and_unload()
    assert run("merge", tmp_path) == 0
    assert_merged(tmp_path, expected.state_dict())
    assert {path.name for path in (tmp_path / "merge").glob("model*")} == {FILE}


COMMANDS = {
    "inspect": [],
    "merge": [],
    "to-lora": ["--rank", "4"],
    "convert": ["--to", "torch", "--torch-generation", "bf16-24bit"],
    "verify": [],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = save_base("llama", folder / "base", shard="20KB")
    save_adapter("llama", base, folder / "adapter", save_projection=False)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_incomplete_and_quantised_models_are_refused_by_every_command(
    command, pair, tmp_path, capsys
):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "base" / INDEX).read_text())
    lost = "model.layers.1.mlp.up_proj.weight"
    shard = tmp_path / "base" / index["weight_map"][lost]
    whole = load_file(shard)
    save_file({k: v for k, v in whole.items() if k != lost}, shard, {"format": "pt"})
    assert run(command, tmp_path, *COMMANDS[command]) == 1
    error = capsys.readouterr().err
    assert lost in error and "incomplete" in error
    save_file(whole, shard, {"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert run(command, tmp_path, *COMMANDS[command]) == 1
    assert "quant_method 'gptq'" in capsys.readouterr().err
    assert not (tmp_path / command).exists()


def clip():
    eyes = {**WIDE, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    text = {**WIDE, "vocab_size": 96, "max_position_embeddings": 64, "projection_dim": 16}
    return T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=eyes, projection_dim=16))


def image_and_gpt2():
    vit = T.ViTConfig(**WIDE, image_size=16, patch_size=8)
    gpt2 = T.GPT2Config(vocab_size=96, n_embd=24, n_layer=1, n_head=2, n_positions=32)
    make = T.VisionTextDualEncoderConfig.from_vision_text_configs
    return T.VisionTextDualEncoderModel(make(vit, gpt2, projection_dim=16))


@pytest.mark.parametrize(
    "make, targets",
    [
        (clip, ["q_proj", "v_proj"]),
        (image_and_gpt2, ["query", "attn.c_proj", "c_fc", "text_projection"]),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_tensors_without_dimensions_keep_their_bits(make, targets, half, tmp_path):
    torch.manual_seed(0)
    model = make().bfloat16() if half else make()
    expected = adapt(model, tmp_path, target_modules=targets)
    assert run("merge", tmp_path) == 0
    before, after = (load_file(tmp_path / name / FILE) for name in ("base", "merge"))
    assert after["logit_scale"].shape == () and before["logit_scale"] == after["logit_scale"]
    if not half:
        assert_merged(tmp_path, expected.merge_and_unload().state_dict())


BERT = {**WIDE, "vocab_size": 96, "max_position_embeddings": 64}


def bart(kind):
    sides = {
        f"{side}_{what}": number
        for side in ("encoder", "decoder")
        for what, number in {"layers": 1, "attention_heads": 3, "ffn_dim": 40}.items()
    }
    return kind(T.BartConfig(**sides, d_model=24, vocab_size=96, max_position_embeddings=64))


def speech():
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    config = T.Wav2Vec2Config(**WIDE, **convolutions, **positions, vocab_size=32)
    return T.Wav2Vec2ForCTC(config)


def hidden_patches():
    size = {"image_size": 8, "patch_size": 4, "vocab_size": 32, "use_mask_token": True}
    return T.BeitForMaskedImageModeling(T.BeitConfig(**WIDE, **size))


UNTIED = {
    "letters, of sound": (speech, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a codebook, of patches": (
        hidden_patches,
        {"target_modules": ["query"], "modules_to_save": ["lm_head"]},
    ),
    "a classifier's embeddings": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)),
        {
            "target_modules": ["query"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["word_embeddings"],
        },
    ),
    "a model's without a head": (
        lambda: T.GPT2Model(T.GPT2Config(vocab_size=96, n_embd=24, n_layer=1, n_head=2)),
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    ),
    "a decoder's that classifies": (
        lambda: T.OPTForSequenceClassification(
            T.OPTConfig(
                hidden_size=24,
                word_embed_proj_dim=24,
                ffn_dim=40,
                num_hidden_layers=1,
                num_attention_heads=3,
                vocab_size=96,
            )
        ),
        {
            "target_modules": ["q_proj"],
            "task_type": "SEQ_CLS",
            "modules_to_save": ["embed_tokens"],
        },
    ),
}


@pytest.mark.parametrize("kind", UNTIED)
def test_embeddings_that_nothing_shares_are_merged(kind, tmp_path):
    make, settings = UNTIED[kind]
    torch.manual_seed(0)
    expected = adapt(make(), tmp_path, **settings)
    assert run("merge", tmp_path) == 0
    assert_merged(tmp_path, expected.merge_and_unload().state_dict())


def test_tied_embeddings_that_did_not_change_are_merged(tmp_path):
    """PEFT writes both sides where the vocabulary was resized, and trains neither."""
    torch.manual_seed(0)
    text = {**WIDE, "vocab_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**text))
    model.resize_token_embeddings(100)
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    expected = adapt(model, tmp_path, {"save_embedding_layers": True}, **settings)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= keys
    assert run("merge", tmp_path) == 0
    assert_merged(tmp_path, expected.merge_and_unload().state_dict())


def test_a_tied_layer_whose_change_is_nothing_is_merged(tmp_path):
    base = save_base("opt", tmp_path / "base")
    save_adapter("opt", base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.lm_head.randlora_lambda"
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, file, {"format": "pt"})
    model = peft.PeftModel.from_pretrained(load("opt", base), tmp_path / "adapter").eval()
    assert run("merge", tmp_path) == 0
    expected = logits(model)
    found = logits(load("opt", tmp_path / "merge"))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "kind, task, module",
    [
        (T.BartForConditionalGeneration, "SEQ_2_SEQ_LM", "lm_head"),
        (T.BartForSequenceClassification, "SEQ_CLS", "shared"),
        (T.BartForSequenceClassification, "SEQ_CLS", "decoder.embed_tokens"),
    ],
)
def test_what_encoder_and_decoder_share_is_refused(kind, task, module, tmp_path, capsys):
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj"], "task_type": task, "modules_to_save": [module]}
    adapt(bart(kind), tmp_path, **settings)
    assert run("merge", tmp_path) == 1
    assert "shares its weight with" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["query", "decoder"], "bias": "randlora_only"},
        {"target_modules": ["query"], "modules_to_save": ["decoder"]},
    ],
)
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_bias_of_two_names_is_merged(kind, settings, tmp_path):
    """The head's own, which its decoder uses: files of models have the first name alone."""
    torch.manual_seed(0)
    config = getattr(T, f"{kind}Config")(**BERT, tie_word_embeddings=False)
    model = getattr(T, f"{kind}ForMaskedLM")(config)
    expected = adapt(model, tmp_path, **settings).merge_and_unload()
    assert run("merge", tmp_path) == 0
    ids = torch.arange(2, 9)[None]
    merged = type(model).from_pretrained(tmp_path / "merge").eval()
    unadapted = type(model).from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        found, right, before = (m(ids).logits for m in (merged, expected, unadapted))
    assert (
        (found - right).abs().max()
        <= 1e-5 * right.abs().max()
        < 1e-3 * (right - before).abs().max()
    )
    keys = [load_file(tmp_path / name / FILE).keys() for name in ("base", "merge")]
    assert keys[0] == keys[1]
