"""Weights stored (in, out), against the PyTorch models that have them."""

import pytest
import torch
import transformers as T
from randlora_jax.interop.base_model import base_shapes
from randlora_jax.interop.conv1d import is_conv1d

pytestmark = pytest.mark.torch

GPT2 = {"vocab_size": 20, "n_embd": 12, "n_layer": 1, "n_head": 3, "n_inner": 12}
WIDE = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}
CLVP = {
    "vocab_size": 20,
    "hidden_size": 12,
    "n_inner": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
}
NEO = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_layers": 1,
    "num_heads": 3,
    "attention_types": [[["global"], 1]],
    "intermediate_size": 12,
}
VIT = T.ViTConfig(**WIDE, image_size=16, patch_size=8)


def image_and_text():
    text = T.GPT2Config(**GPT2)
    make = T.VisionTextDualEncoderConfig.from_vision_text_configs
    return T.VisionTextDualEncoderModel(make(VIT, text, projection_dim=12))


def image_to_text():
    make = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs
    return T.VisionEncoderDecoderModel(make(VIT, T.GPT2Config(**GPT2)))


MODELS = {
    "gpt2 as text_model": image_and_text,
    "gpt2 as decoder": image_to_text,
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT2)),
    "openai-gpt": lambda: T.OpenAIGPTModel(T.OpenAIGPTConfig(**GPT2)),
    "imagegpt": lambda: T.ImageGPTModel(T.ImageGPTConfig(**GPT2)),
    "clvp_decoder": lambda: T.ClvpForCausalLM(T.ClvpDecoderConfig(**CLVP)),
    "gpt_neo": lambda: T.GPTNeoForCausalLM(T.GPTNeoConfig(**NEO)),
    "gpt_bigcode": lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**GPT2)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_orientation_of_square_and_other_weights(kind, tmp_path):
    model = MODELS[kind]()
    state = {k: v.reshape(1) if v.ndim == 0 else v for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    conv1d = T.pytorch_utils.Conv1D
    config = model.config.to_dict()
    shapes = {key: tuple(x.shape) for key, x in state.items()}
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, conv1d)) and f"{name}.weight" in state:
            is_one = isinstance(module, conv1d)
            assert is_conv1d(f"{name}.weight", shapes, config) == is_one, name
            expected[name] = tuple(module.weight.shape)[:: -1 if is_one else 1]
    assert base_shapes(tmp_path, expected) == expected


def test_what_an_unknown_model_does_not_tell():
    gpt2 = {"h.0.attn.c_attn.weight": (12, 36), "h.0.attn.c_attn.bias": (36,)}
    gpt2 |= {"h.0.attn.c_proj.weight": (12, 12), "h.0.attn.c_proj.bias": (12,)}
    mine, known = {"model_type": "mine"}, {"model_type": "gpt2"}
    assert is_conv1d("h.0.attn.c_attn.weight", gpt2, mine) is True  # its bias tells
    assert is_conv1d("h.0.attn.c_proj.weight", gpt2, mine) is None
    assert is_conv1d("h.0.attn.c_proj.weight", gpt2, known) is True
    turned = {**gpt2, "h.0.attn.c_attn.weight": (36, 12)}
    assert is_conv1d("h.0.attn.c_proj.weight", turned, known) is False
