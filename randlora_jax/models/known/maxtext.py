"""MaxText: its decoders, as flax.nnx and flax.linen modules, dense and mixtures of experts.

Layers are scanned along an axis of the user's choice (1, unless said), behind the first axis of
every kernel. Experts are the first axis of three arrays in one module.

A twin in PyTorch is named for Qwen alone: for Llama and Mixtral MaxText keeps query kernels divided
by the root of a head's width, and Llama's heads in another order, so that an adapter of one side
would mean another thing on the other. Those keep the names of MaxText.
"""

from dataclasses import replace
from typing import Any

from randlora_jax.models.known.entry import Entries, KnownModel, twin
from randlora_jax.models.names import Rules

_KERNELS = {
    "self_attention/(query|key|value)": "i o o",
    "self_attention/out": "i i o",
    r"mlp/(wi_\d|wo)": "i o",
    "(moe_block|MoeBlock_0)/gate": "i o",
    r"(moe_block|MoeBlock_0)/(wi_\d|wo)": "s i o",
}
_QWEN = {
    "qwen2": twin("Qwen2ForCausalLM", "qwen2"),
    "qwen3": twin("Qwen3ForCausalLM", "qwen3"),
    "qwen3_moe": twin("Qwen3MoeForCausalLM", "qwen3_moe"),
}


def _layouts(config: Any) -> dict[str, str]:
    layouts = {"decoder/logits_dense": "i o"}
    for pattern, axes in _KERNELS.items():
        letters = axes.split()
        if config.scan_layers:
            letters.insert(config.param_scan_axis, "s")
        path = "decoder/layers/" if config.scan_layers else r"decoder/layers_\d+/"
        layouts[path + pattern] = " ".join(letters)
    return layouts


def _names(scanned: bool) -> Rules:
    """Qwen's. An expert is the first stack axis of its kernel, a scanned layer the last."""
    path = "decoder/layers/" if scanned else r"decoder/layers_(?P<layer>\d+)/"
    layer = "model.layers." + ("{}." if scanned else r"\g<layer>.")
    expert = "model.layers.{1}.mlp.experts.{0}." if scanned else layer + "mlp.experts.{}."
    return {
        path + "self_attention/(?P<part>[qk])[a-z]+_norm": layer + r"self_attn.\g<part>_norm",
        path + "self_attention/(?P<part>[qkv])[a-z]+": layer + r"self_attn.\g<part>_proj",
        path + "self_attention/out": layer + "self_attn.o_proj",
        path + "mlp/wi_0": layer + "mlp.gate_proj",
        path + "mlp/wi_1": layer + "mlp.up_proj",
        path + "mlp/wo": layer + "mlp.down_proj",
        path + "moe_block/gate": layer + "mlp.gate",
        path + "moe_block/wi_0": expert + "gate_proj",
        path + "moe_block/wi_1": expert + "up_proj",
        path + "moe_block/wo": expert + "down_proj",
        path + "pre_self_attention_layer_norm": layer + "input_layernorm",
        path + "post_self_attention_layer_norm": layer + "post_attention_layernorm",
        "token_embedder": "model.embed_tokens",
        "decoder/decoder_norm": "model.norm",
        "decoder/logits_dense": "lm_head",
    }


def _transformer(model: Any) -> KnownModel:
    # its linen form is a bridge, which keeps the arguments of the nnx class
    config = model.config if hasattr(model, "config") else model.kwargs["config"]
    kind = getattr(config.decoder_block, "value", config.decoder_block)
    layouts = _layouts(config)
    if kind not in _QWEN:
        return KnownModel(layouts=layouts)
    info = _QWEN[kind] if config.logits_via_embedding else replace(_QWEN[kind], tied=())
    return KnownModel(_names(config.scan_layers), layouts, info=info)


ENTRIES: Entries = {
    f"maxtext.models.models.{name}": _transformer
    for name in ("Transformer", "TransformerLinen", "TransformerLinenPure")
}
