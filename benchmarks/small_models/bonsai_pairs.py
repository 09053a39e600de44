"""jax-ml/bonsai's models and their twins: weights go through bonsai's own loaders."""

import dataclasses
import functools
import importlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file

from small_models import bonsai
from small_models.entry import Entry, ids
from small_models.pair import LOCAL_AND_GLOBAL, TEXT, Pair

EXACT_GELU = functools.partial(jax.nn.gelu, approximate=False)
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def _loader(package, function, config, **said):
    def load(folder):
        params = importlib.import_module(f"bonsai.models.{package}.params")
        return getattr(params, function)(folder, config, **said)

    return load


def qwen3():
    config = transformers.Qwen3Config(**TEXT, rope_theta=1e6, tie_word_embeddings=False)
    load = _loader("qwen3", "create_model_from_safe_tensors", bonsai.qwen3_config())
    return Pair(bonsai.qwen3(), "Qwen3ForCausalLM", config, load=load)


def qwen3_vl():
    """On text alone: bonsai's forward pass drops what the twin does with deep vision features."""
    module = importlib.import_module("bonsai.models.qwen3_vl.modeling")
    sizes = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 36,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (0, 1),
    }
    ours = module.ModelConfig(
        vision_config=module.Qwen3VLVisionConfig(**sizes),
        text_config=module.Qwen3VLTextConfig(
            **TEXT, mrope_section=(2, 2, 2), tie_word_embeddings=False
        ),
    )
    rope = {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"}
    text = {**TEXT, "rope_theta": ours.text_config.rope_theta, "rope_scaling": rope}
    config = transformers.Qwen3VLConfig(
        vision_config=sizes, text_config=text, tie_word_embeddings=False
    )

    def call(model, tokens):
        return model(tokens, cache=module.init_cache(ours, 3, 8, 0, jnp.float32))

    model = module.Qwen3VLForConditionalGeneration(ours, rngs=nnx.Rngs(0))
    entry = Entry(model, {"tokens": ids()}, call, "optional=['model/visual/.*']")
    load = _loader("qwen3_vl", "create_model_from_safe_tensors", ours)
    return Pair(entry, "Qwen3VLForConditionalGeneration", config, load=load)


def gemma3():
    text = {
        **TEXT,
        "layer_types": LOCAL_AND_GLOBAL,
        "sliding_window": 64,
        "query_pre_attn_scalar": 12,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=60,
    )

    def inputs(ours):
        seen = ours["kinds"] == 1
        return {
            "input_ids": np.where(seen, 60, ours["tokens"]),
            "token_type_ids": ours["kinds"],
            "pixel_values": ours["images"].transpose(0, 3, 1, 2),
        }

    entry = bonsai.gemma3()
    load = _loader("gemma3", "create_gemma3_from_pretrained", entry.model.config)
    return Pair(entry, "Gemma3ForConditionalGeneration", config, inputs, load)


def vit(**changes):
    config = transformers.ViTConfig(**VISION, num_labels=5, **changes)
    load = _loader("vit", "create_vit_from_pretrained", bonsai.vit_config())

    def inputs(ours):
        return {"pixel_values": ours["images"].transpose(0, 3, 1, 2)}

    return Pair(bonsai.vit(), "ViTForImageClassification", config, inputs, load)


def dinov3(rotating="bfloat16"):
    # bonsai rotates queries and keys in bfloat16, whatever the model's dtype
    module = importlib.import_module("bonsai.models.dinov3.modeling")
    module.jnp = types.SimpleNamespace(**{**vars(jnp), "bfloat16": getattr(jnp, rotating)})
    config = transformers.DINOv3ViTConfig(
        **VISION, use_gated_mlp=True, hidden_act="silu", num_register_tokens=4
    )
    entry = bonsai.dinov3()
    load = _loader("dinov3", "create_model_from_safe_tensors", entry.model.config)

    def inputs(ours):
        return {"pixel_values": ours["images"]}

    return Pair(entry, "DINOv3ViTModel", config, inputs, load, "last_hidden_state")


def umt5():
    config = transformers.UMT5Config(
        vocab_size=61,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
    )
    entry = bonsai.umt5()

    def load(folder):  # it reads PyTorch's own format alone, and its dropout gets no arrays
        params = importlib.import_module("bonsai.models.umt5.params")
        torch.save(load_file(f"{folder}/model.safetensors"), f"{folder}/model.bin")
        made = params.create_model(type(entry.model), f"{folder}/model.bin", entry.model.config)
        nnx.update(entry.model, nnx.state(made, nnx.Param))
        return entry.model

    def inputs(ours):
        tokens = ours["tokens"]
        ones = np.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": ones, "decoder_input_ids": tokens}

    def call(model, tokens):  # the model itself ends before its head
        return model.lm_head(entry.call(model, tokens))

    whole = dataclasses.replace(entry, call=call)
    return Pair(whole, "UMT5ForConditionalGeneration", config, inputs, load)


def mamba2():
    config = transformers.Mamba2Config(
        vocab_size=61,
        hidden_size=32,
        state_size=16,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    entry = bonsai.mamba2()
    known = _loader("mamba2", "create_model_from_torch_checkpoint", entry.model.config)

    def load(folder):  # it passes the embedding by, which transformers names otherwise
        model, weights = known(folder), load_file(f"{folder}/model.safetensors")
        embedding = jnp.asarray(weights["backbone.embeddings.weight"].numpy())
        model.backbone.embedder.embedding[...] = embedding
        return model

    return Pair(entry, "Mamba2ForCausalLM", config, load=load)


def whisper(gelu=jax.nn.gelu):
    # behind its convolutions bonsai takes the tanh form, and the exact one elsewhere
    module = importlib.import_module("bonsai.models.whisper.modeling")
    functions = types.SimpleNamespace(**{**vars(jax.nn), "gelu": gelu})
    module.jax = types.SimpleNamespace(**{**vars(jax), "nn": functions})
    config = transformers.WhisperConfig(
        vocab_size=61,
        d_model=24,
        num_mel_bins=6,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_source_positions=8,
        max_target_positions=10,
        pad_token_id=0,
    )
    entry = bonsai.whisper()

    def load(folder):  # it knows but one size
        params = importlib.import_module("bonsai.models.whisper.params")
        config = bonsai.whisper_config()
        with mock.patch.object(module.ModelConfig, "whisper_tiny", lambda: config):
            return params.create_whisper_from_pretrained(folder)

    def call(model, sound, tokens):  # its head is its embedding, and left to the user
        return model.decoder.embed_tokens.attend(entry.call(model, sound, tokens))

    def inputs(ours):
        sound = ours["sound"].transpose(0, 2, 1)
        return {"input_features": sound, "decoder_input_ids": ours["tokens"]}

    whole = dataclasses.replace(entry, call=call)
    return Pair(whole, "WhisperForConditionalGeneration", config, inputs, load)


def vjepa2():
    config = transformers.VJEPA2Config(
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        crop_size=32,
        frames_per_clip=4,
        num_pooler_layers=1,
        num_labels=5,
    )
    entry = bonsai.vjepa2()
    load = _loader("vjepa2", "create_model_from_safe_tensors", entry.model.config, classifier=True)

    def inputs(ours):
        return {"pixel_values_videos": ours["video"].transpose(0, 1, 4, 2, 3)}

    return Pair(entry, "VJEPA2ForVideoClassification", config, inputs, load)


PAIRS = {
    "bonsai, Qwen 3": qwen3,
    "bonsai, Qwen 3 VL on text": qwen3_vl,
    "bonsai, Gemma 3 with vision": gemma3,
    "bonsai, ViT": vit,
    "bonsai, ViT; the twin's gelu by tanh": lambda: vit(hidden_act="gelu_pytorch_tanh"),
    "bonsai, DINOv3": dinov3,
    "bonsai, DINOv3; rotating in float32": lambda: dinov3("float32"),
    "bonsai, UMT5": umt5,
    "bonsai, Mamba 2": mamba2,
    "bonsai, V-JEPA 2": vjepa2,
    "bonsai, Whisper": whisper,
    "bonsai, Whisper; exact gelu in its convolutions": lambda: whisper(EXACT_GELU),
}
