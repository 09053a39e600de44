"""Whoever wraps a Flax model that computes another than PyTorch's is told."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from randlora_jax.interop.flax_gaps import not_computed, unread_rope

from randlora_jax import RandLoraConfig, get_peft_model

pytestmark = pytest.mark.torch

SIZES = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
GEMMA = SIZES | {"head_dim": 8}
BERT = {key: x for key, x in SIZES.items() if key != "num_key_value_heads"}
VISION = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 2], "num_labels": 3}
MARIAN = {
    **{"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24},
    **{"decoder_ffn_dim": 24, "max_position_embeddings": 32, "pad_token_id": 1},
}
SPEECH = {
    **{key: x for key, x in BERT.items() if key != "max_position_embeddings"},
    **{"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_dim": (8,)},
    **{"conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
YARN = {"rope_type": "linear", "factor": 4.0}
V5 = {"rope_type": "default", "rope_theta": 5e5}

# a model, what its config asks for, and the field that must be named; none where both agree
CASES = {
    "plain": ("LlamaForCausalLM", SIZES, {}, None),
    "theta": ("LlamaForCausalLM", SIZES, {"rope_theta": 10.0}, "rope_theta 10.0"),
    "scaling": ("LlamaForCausalLM", SIZES, {"rope_scaling": YARN}, "rope_scaling"),
    "default": ("LlamaForCausalLM", SIZES, {"rope_scaling": {"rope_type": "default"}}, None),
    "attention": ("LlamaForCausalLM", SIZES, {"attention_bias": True}, None),
    "mlp": ("LlamaForCausalLM", SIZES, {"mlp_bias": True}, "mlp_bias True"),
    "mistral": ("MistralForCausalLM", SIZES, {}, None),
    "mistral theta": ("MistralForCausalLM", SIZES, {"rope_theta": 10.0}, "rope_theta 10.0"),
    "window": ("MistralForCausalLM", SIZES, {"sliding_window": None}, "sliding_window None"),
    "gemma": ("GemmaForCausalLM", GEMMA, {}, None),
    "gemma theta": ("GemmaForCausalLM", GEMMA, {"rope_theta": 10.0}, "rope_theta 10.0"),
    "gpt2": ("GPT2LMHeadModel", GPT2, {}, None),
    "scale": ("GPT2LMHeadModel", GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
    "by layer": (
        *("GPT2LMHeadModel", GPT2),
        *({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ),
    "relative": (
        *("BertForMaskedLM", BERT),
        *({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ),
    "tied": ("LlamaForCausalLM", SIZES, {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    "mistral tied": (
        *("MistralForCausalLM", SIZES),
        *({"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ),
    "without a head": ("LlamaModel", SIZES, {"tie_word_embeddings": True}, None),
    "apart": (
        *("MarianMTModel", MARIAN),
        *({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
    ),
    "stride": (
        *("ResNetForImageClassification", VISION),
        *({"downsample_in_bottleneck": True}, "downsample_in_bottleneck True"),
    ),
    "attention adapters": (
        *("Wav2Vec2ForCTC", SPEECH),
        *({"adapter_attn_dim": 4}, "adapter_attn_dim 4"),
    ),
}

NORMAL = np.random.default_rng(0).normal(size=3 * 32 * 32).astype(np.float32)
INPUTS = {
    "input_ids": np.arange(12)[None] % 32,
    "input_values": NORMAL[None, :64],
    "pixel_values": NORMAL.reshape(1, 3, 32, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_so(case, tmp_path):
    """The two models differ where the warning says so, and nowhere else."""
    name, sizes, asked, field = CASES[case]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**sizes, **asked, attn_implementation="eager")).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if key.endswith("bias"):
                p.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    flax = getattr(transformers, f"Flax{name}").from_pretrained(tmp_path, from_pt=True)
    inputs = {theirs.main_input_name: INPUTS[theirs.main_input_name]}
    if theirs.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = INPUTS["input_ids"]
    with torch.no_grad():
        expected = theirs(**{key: torch.from_numpy(x) for key, x in inputs.items()})[0].numpy()
    apart = np.abs(np.asarray(flax(**inputs)[0]) - expected).max() / np.abs(expected).max()
    assert (apart > 1e-3) == (field is not None), apart

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        get_peft_model(flax, RandLoraConfig(r=2, target_modules="all-linear"))
    told = [str(x.message) for x in said if "another model than PyTorch's" in str(x.message)]
    assert len(told) == (field is not None)
    assert all(field in text and "google-tunix" in text for text in told)
    assert all(x.filename == __file__ for x in said if "PyTorch's" in str(x.message))


def test_what_release_5_writes_is_told(tmp_path):
    config = transformers.LlamaConfig(**SIZES, rope_parameters=V5)
    config.save_pretrained(tmp_path)
    read = transformers.LlamaConfig.from_pretrained(tmp_path)
    assert read.rope_theta == 1e4  # what both sides of 4.57 compute with
    assert "500000" in unread_rope(read)
    (only,) = not_computed(read)
    assert only.startswith("rope_parameters") and "in PyTorch either" in only
    read.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert not_computed(read) == []
    read.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert "linear" in unread_rope(read)


def test_a_part_of_a_model_of_two_is_looked_at():
    bert = transformers.BertConfig(**BERT)
    other = transformers.BertConfig(**BERT, position_embedding_type="relative_key")
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs
    assert not_computed(pair(bert, bert)) == []
    assert len(not_computed(pair(bert, other))) == 1
