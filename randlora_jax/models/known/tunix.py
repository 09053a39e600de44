"""google-tunix: Llama 3, Qwen 2, Qwen 3 and its mixture of experts, Gemma 1 to 3 (flax.nnx).

Attention holds ``Einsum`` layers with a kernel ``w``; Gemma's keeps keys and values, or all three,
in one array. A mixture of experts holds three arrays (expert, in, out) in one module.
"""

import inspect
import sys
from dataclasses import replace
from typing import Any

from randlora_jax.models.known.entry import Entries, KnownModel, twin
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_einsum
from randlora_jax.models.names import Rules
from randlora_jax.models.registry import BaseModelInfo

# The parts axis looks like an out axis in their einsum strings.
_LAYOUTS = {r"layers/\d+/attn/q?kv_einsum": "s o i o"}
_EXPERTS = {r"layers/\d+/mlp/(gate|up|down)_proj": "s i o"}


def _names(decoder: str = "model.") -> Rules:
    """Of a decoder whose PyTorch twin has it as `decoder`."""
    layer = decoder + r"layers.\1."
    attention = layer + "self_attn."
    return {
        r"layers/(\d+)/attn/([qkvo])_proj": attention + r"\2_proj",
        r"layers/(\d+)/attn/q_einsum": attention + "q_proj",
        r"layers/(\d+)/attn/kv_einsum": [attention + f"{part}_proj" for part in "kv"],
        r"layers/(\d+)/attn/qkv_einsum": [attention + f"{part}_proj" for part in "qkv"],
        r"layers/(\d+)/attn/attn_vec_einsum": attention + "o_proj",
        r"layers/(\d+)/attn/([qk])_norm": attention + r"\2_norm",
        r"layers/(\d+)/attn/_query_norm": attention + "q_norm",
        r"layers/(\d+)/attn/_key_norm": attention + "k_norm",
        r"layers/(\d+)/mlp/(gate|up|down)_proj": layer + r"mlp.\2_proj",
        r"layers/(\d+)/(input|post_attention)_layernorm": layer + r"\2_layernorm",
        r"layers/(\d+)/pre_attention_norm": layer + "input_layernorm",
        r"layers/(\d+)/post_att(?:entio)?n_norm": layer + "post_attention_layernorm",
        r"layers/(\d+)/(pre|post)_ffw_norm": layer + r"\2_feedforward_layernorm",
        "embedder": decoder + "embed_tokens",
        "final_norm": decoder + "norm",
    }


# The first rule that matches counts.
_GEMMA_1 = {r"layers/(\d+)/pre_ffw_norm": r"model.layers.\1.post_attention_layernorm", **_names()}
_MIXTURE = {
    **_names(),
    r"layers/(\d+)/mlp/router": r"model.layers.\1.mlp.gate",
    r"layers/(\d+)/mlp/(gate|up|down)_proj": r"model.layers.\1.mlp.experts.{}.\2_proj",
}

_BLOCK, _TOWER = "vision_encoder/siglip_encoder/", "model.vision_tower.vision_model."
_SEEING: Rules = {
    **_names("model.language_model."),
    _BLOCK + r"transformer/blocks/(\d+)/attn/([qkv])\w+_proj": (
        _TOWER + r"encoder.layers.\1.self_attn.\2_proj"
    ),
    _BLOCK + r"transformer/blocks/(\d+)/attn/out_proj": (
        _TOWER + r"encoder.layers.\1.self_attn.out_proj"
    ),
    _BLOCK + r"transformer/blocks/(\d+)/mlp/(fc\d)": _TOWER + r"encoder.layers.\1.mlp.\2",
    _BLOCK + r"transformer/blocks/(\d+)/ln(\d)": _TOWER + r"encoder.layers.\1.layer_norm\2",
    _BLOCK + "transformer/encoder_norm": _TOWER + "post_layernorm",
    _BLOCK + "embedding": _TOWER + "embeddings.patch_embedding",
    "embedder/mm_soft_embedding_norm": "model.multi_modal_projector.mm_soft_emb_norm",
}


def _einsum(module: Any) -> LayerType | None:
    """What is known of an ``Einsum``; of the vision tower's projector nothing.

    Its PyTorch twin is a bare parameter, which PEFT adapts as little.
    """
    equation: str = module.einsum_str
    return None if "..." in equation else of_einsum(equation, leaf="w")


def _known(
    package: str, names: Rules, info: BaseModelInfo, layouts: dict[str, str] | None = None
) -> KnownModel:
    types: Table = {f"tunix.models.{package}.model.Einsum": _einsum}
    return KnownModel(names, {**_LAYOUTS, **(layouts or {})}, types, info)


def _other_positions(package: str, model: Any) -> str:
    """How attention turns positions otherwise than the config says; "" where it does not.

    tunix 0.1.7's Llama 3 and Qwen 3 leave ``rope_theta`` to a default of ``apply_rope``.
    """
    code = sys.modules.get(f"tunix.models.{package}.model")
    asked = getattr(getattr(model, "config", None), "rope_theta", None)
    if code is None or asked is None:
        return ""
    methods = filter(inspect.isfunction, vars(code.Attention).values())
    if any("rope_theta" in inspect.unwrap(method).__code__.co_names for method in methods):
        return ""  # of the config, as other releases may
    theta = inspect.signature(code.apply_rope).parameters.get("rope_theta")
    if theta is None or theta.default == asked:
        return ""
    return (
        f"rope_theta {asked} (its attention takes {theta.default}, the default of "
        f"tunix.models.{package}.model.apply_rope: put functools.partial(apply_rope, "
        f"rope_theta={asked}) in its place there before the model runs; docs/trainers.md has what "
        "rope_scaling wants, which Llama 3.1 and 3.2 have besides)"
    )


def _llama3(model: Any) -> KnownModel:
    known = _known("llama3", _names(), twin("LlamaForCausalLM", "llama"))
    return replace(known, differs=_other_positions("llama3", model))


def _qwen3(model: Any) -> KnownModel:
    if model.config.num_experts is None:
        known = _known("qwen3", _names(), twin("Qwen3ForCausalLM", "qwen3"))
    else:
        known = _known("qwen3", _MIXTURE, twin("Qwen3MoeForCausalLM", "qwen3_moe"), _EXPERTS)
    return replace(known, differs=_other_positions("qwen3", model))


def _gemma(model: Any) -> KnownModel:
    if model.config.use_post_attn_norm:
        return _known("gemma", _names(), twin("Gemma2ForCausalLM", "gemma2"))
    return _known("gemma", _GEMMA_1, twin("GemmaForCausalLM", "gemma"))


def _gemma3(model: Any) -> KnownModel:
    if model.config.vision_config is None:
        return _known("gemma3", _names(), twin("Gemma3ForCausalLM", "gemma3", "gemma3_text"))
    tied = ("model.language_model.embed_tokens", "lm_head")
    info = twin("Gemma3ForConditionalGeneration", "gemma3", tied=tied)
    return _known("gemma3", _SEEING, info)


ENTRIES: Entries = {
    "tunix.models.llama3.model.Llama3": _llama3,
    "tunix.models.qwen2.model.Qwen2": _known("qwen2", _names(), twin("Qwen2ForCausalLM", "qwen2")),
    "tunix.models.qwen3.model.Qwen3": _qwen3,
    "tunix.models.gemma.model.Gemma": _gemma,
    "tunix.models.gemma3.model.Gemma3": _gemma3,
}
