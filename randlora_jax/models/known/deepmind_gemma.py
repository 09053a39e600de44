"""DeepMind's gemma (flax.linen): Gemma 1 to 3, the text models.

Its ``Einsum`` is called with the equation first, and a feed-forward module holds the kernels of two
of them itself: the gate's and the up projection's are one array, (2, in, out) or (2, out, in).
"""

from typing import Any

from randlora_jax.models.known.entry import Entries, KnownModel, twin
from randlora_jax.models.names import Rules
from randlora_jax.models.registry import BaseModelInfo

_ATTENTION = r"model.layers.\1.self_attn."
_NAMES: Rules = {
    r"layer_(\d+)/attn/q_einsum": _ATTENTION + "q_proj",
    r"layer_(\d+)/attn/kv_einsum": [_ATTENTION + f"{part}_proj" for part in "kv"],
    r"layer_(\d+)/attn/qkv_einsum": [_ATTENTION + f"{part}_proj" for part in "qkv"],
    r"layer_(\d+)/attn/attn_vec_einsum": _ATTENTION + "o_proj",
    r"layer_(\d+)/attn/_query_norm": _ATTENTION + "q_norm",
    r"layer_(\d+)/attn/_key_norm": _ATTENTION + "k_norm",
    r"layer_(\d+)/mlp/gating_einsum": [
        rf"model.layers.\1.mlp.{part}_proj" for part in ("gate", "up")
    ],
    r"layer_(\d+)/mlp/linear": r"model.layers.\1.mlp.down_proj",
    r"layer_(\d+)/pre_attention_norm": r"model.layers.\1.input_layernorm",
    r"layer_(\d+)/post_attention_norm": r"model.layers.\1.post_attention_layernorm",
    r"layer_(\d+)/(pre|post)_ffw_norm": r"model.layers.\1.\2_feedforward_layernorm",
    "embedder": "model.embed_tokens",
    "final_norm": "model.norm",
}
# The first rule that matches counts.
_GEMMA_1 = {r"layer_(\d+)/pre_ffw_norm": r"model.layers.\1.post_attention_layernorm", **_NAMES}

_LAYOUTS = {
    r"layer_\d+/attn/q_einsum": "o i o",
    r"layer_\d+/attn/q?kv_einsum": "s o i o",
    r"layer_\d+/attn/attn_vec_einsum": "i i o",
    r"layer_\d+/mlp/linear": "i o",
}


def _info(config: Any) -> BaseModelInfo:
    if config.use_qk_norm:
        return twin("Gemma3ForCausalLM", "gemma3", "gemma3_text")
    if config.use_post_attn_norm:
        return twin("Gemma2ForCausalLM", "gemma2")
    return twin("GemmaForCausalLM", "gemma")


def _transformer(model: Any) -> KnownModel:
    config = model.config
    gating = "s o i" if config.transpose_gating_einsum else "s i o"
    layouts = {**_LAYOUTS, r"layer_\d+/mlp/gating_einsum": gating}
    names = _NAMES if config.use_post_attn_norm else _GEMMA_1
    return KnownModel(names, layouts, info=_info(config))


ENTRIES: Entries = {"gemma.gm.nn._transformer.Transformer": _transformer}
