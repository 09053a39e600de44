"""Model classes of flax.nnx whose PyTorch twins are known, as data; nothing here is imported.

google-tunix's Llama 3, Qwen 3, Gemma 2 and Gemma 3 (its text model). Their attention holds
``Einsum`` layers with a kernel ``w``; Gemma's keeps keys and values, or all three, in one array.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_einsum
from randlora_jax.models.names import Rules
from randlora_jax.models.registry import BaseModelInfo


@dataclass(frozen=True)
class KnownModel:
    """What users would else state themselves: see `get_peft_model`.

    Args:
      info: what PEFT records of the PyTorch twin.
    """

    names: Rules = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    layer_types: Table = field(default_factory=dict)
    info: BaseModelInfo = field(default_factory=BaseModelInfo)


_ATTENTION, _LAYER = r"layers/(\d+)/attn/", r"layers/(\d+)/"
_TORCH_ATTENTION, _TORCH_LAYER = r"model.layers.\1.self_attn.", r"model.layers.\1."

_TUNIX_NAMES: Rules = {
    _ATTENTION + "([qkvo])_proj": _TORCH_ATTENTION + r"\2_proj",
    _ATTENTION + "q_einsum": _TORCH_ATTENTION + "q_proj",
    _ATTENTION + "kv_einsum": [_TORCH_ATTENTION + f"{part}_proj" for part in "kv"],
    _ATTENTION + "qkv_einsum": [_TORCH_ATTENTION + f"{part}_proj" for part in "qkv"],
    _ATTENTION + "attn_vec_einsum": _TORCH_ATTENTION + "o_proj",
    _ATTENTION + "([qk])_norm": _TORCH_ATTENTION + r"\2_norm",
    _ATTENTION + "_query_norm": _TORCH_ATTENTION + "q_norm",
    _ATTENTION + "_key_norm": _TORCH_ATTENTION + "k_norm",
    _LAYER + "mlp/(gate|up|down)_proj": _TORCH_LAYER + r"mlp.\2_proj",
    _LAYER + "(input|post_attention)_layernorm": _TORCH_LAYER + r"\2_layernorm",
    _LAYER + "pre_attention_norm": _TORCH_LAYER + "input_layernorm",
    _LAYER + "post_attention_norm": _TORCH_LAYER + "post_attention_layernorm",
    _LAYER + "(pre|post)_ffw_norm": _TORCH_LAYER + r"\2_feedforward_layernorm",
    "embedder": "model.embed_tokens",
    "final_norm": "model.norm",
}

# The parts axis looks like an out axis in their einsum strings.
_TUNIX_LAYOUTS = {_ATTENTION + "q?kv_einsum": "s o i o"}


def _of_tunix(module: Any) -> LayerType:
    return of_einsum(module.einsum_str, leaf="w")


def _tunix(package: str, torch_class: str, torch_package: str, model_type: str) -> KnownModel:
    return KnownModel(
        _TUNIX_NAMES,
        _TUNIX_LAYOUTS,
        {f"tunix.models.{package}.model.Einsum": _of_tunix},
        BaseModelInfo(
            model_type=model_type,
            auto_mapping={
                "base_model_class": torch_class,
                "parent_library": f"transformers.models.{torch_package}.modeling_{torch_package}",
            },
            has_output_head=True,
        ),
    )


_KNOWN = {
    "tunix.models.llama3.model.Llama3": _tunix("llama3", "LlamaForCausalLM", "llama", "llama"),
    "tunix.models.qwen3.model.Qwen3": _tunix("qwen3", "Qwen3ForCausalLM", "qwen3", "qwen3"),
    "tunix.models.gemma.model.Gemma": _tunix("gemma", "Gemma2ForCausalLM", "gemma2", "gemma2"),
    "tunix.models.gemma3.model.Gemma3": _tunix(
        "gemma3", "Gemma3ForCausalLM", "gemma3", "gemma3_text"
    ),
}


def about(model: Any) -> KnownModel:
    """What is known of a model; nothing where it is not in the table."""
    kind = type(model)
    known = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    # Gemma 1 shares Gemma 2's class, and a vision tower changes every name: other twins
    config = getattr(model, "config", None)
    first = not getattr(config, "use_post_attn_norm", True)
    sees = getattr(config, "vision_config", None) is not None
    return KnownModel() if known is None or first or sees else known
