"""openpi's pi0 (flax.nnx around flax.linen): PaliGemma and an action expert, scanned.

Its twin is openpi's own ``PI0Pytorch``. All layers of a scan lie in one array, and in it the two
experts of the mixture are told apart by name: ``mlp`` is the language model's, ``mlp_1`` the
actions'.
"""

from randlora_jax.models.known.entry import Entries, KnownModel
from randlora_jax.models.names import Rules

_LLM, _IMAGE = "PaliGemma/llm/layers/", "PaliGemma/img/Transformer/encoderblock/"
_LANGUAGE = "paligemma_with_expert.paligemma.model.language_model.layers.{}."
_ACTION = "paligemma_with_expert.gemma_expert.model.layers.{}."
_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.{}."


def _decoder(suffix: str, layer: str) -> Rules:
    """Of one expert. A scanned layer is the first stack axis, the parts of an array the last."""
    return {
        _LLM + f"attn/q_einsum{suffix}": layer + "self_attn.q_proj",
        _LLM + f"attn/kv_einsum{suffix}": [layer + f"self_attn.{part}_proj" for part in "kv"],
        _LLM + f"attn/qkv_einsum{suffix}": [layer + f"self_attn.{part}_proj" for part in "qkv"],
        _LLM + f"attn/attn_vec_einsum{suffix}": layer + "self_attn.o_proj",
        _LLM + f"mlp{suffix}/gating_einsum": [
            layer + f"mlp.{part}_proj" for part in ("gate", "up")
        ],
        _LLM + f"mlp{suffix}/linear": layer + "mlp.down_proj",
    }


_NAMES: Rules = {
    **_decoder("", _LANGUAGE),
    **_decoder("_1", _ACTION),
    _IMAGE + r"MultiHeadDotProductAttention_0/([qkv])\w+": _TOWER + r"self_attn.\1_proj",
    _IMAGE + "MultiHeadDotProductAttention_0/out": _TOWER + "self_attn.out_proj",
    _IMAGE + "MlpBlock_0/Dense_0": _TOWER + "mlp.fc1",
    _IMAGE + "MlpBlock_0/Dense_1": _TOWER + "mlp.fc2",
    "PaliGemma/img/head": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
}
_LAYOUTS = {
    _LLM + r"attn/q_einsum(_\d)?": "s o i o",
    _LLM + r"attn/q?kv_einsum(_\d)?": "s s o i o",
    _LLM + r"attn/attn_vec_einsum(_\d)?": "s i i o",
    _LLM + r"mlp(_\d)?/gating_einsum": "s s i o",
    _LLM + r"mlp(_\d)?/linear": "s i o",
    _IMAGE + r"MultiHeadDotProductAttention_\d/(query|key|value)": "s i o o",
    _IMAGE + r"MultiHeadDotProductAttention_\d/out": "s i i o",
    _IMAGE + r"MlpBlock_\d/Dense_\d": "s i o",
    "PaliGemma/img/head": "i o",
}

ENTRIES: Entries = {
    f"openpi.models.{module}.{name}": KnownModel(_NAMES, _LAYOUTS)
    for module, name in (("pi0", "Pi0"), ("pi0_fast", "Pi0FAST"))
}
