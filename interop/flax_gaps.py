"""What a Hugging Face configuration asks for and transformers 4.57's Flax class does not compute.

Such a class reads PyTorch's files and runs, as another model. Each entry was read from the source
of transformers 4.57.6; a shape that differs fails to load by itself, and is not here.
"""

from __future__ import annotations

from typing import Any

from randlora_jax.interop.errors import shown

_PLAIN_ROPE = (
    None,
    {"rope_type": "default"},
    {"type": "default"},
    {"rope_type": "default", "type": "default"},
)

_BERTS = ("albert", "bert", "electra", "roberta", "roberta-prelayernorm", "xlm-roberta")

# By model type: the fields that its Flax class ignores, and the values that it computes with.
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"rope_theta": (1e4,), "rope_scaling": _PLAIN_ROPE, "mlp_bias": (False,)},
    "mistral": {"rope_theta": (1e4,), "rope_scaling": _PLAIN_ROPE},
    "gemma": {"rope_theta": (1e4,), "rope_scaling": _PLAIN_ROPE},
    "gpt2": {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    "marian": {"share_encoder_decoder_embeddings": (True,)},
    "resnet": {"downsample_in_bottleneck": (False,)},
    "wav2vec2": {"adapter_attn_dim": (None,)},
    **{name: {"position_embedding_type": ("absolute",)} for name in _BERTS},
}
_UNTIED = ("llama", "mistral")  # the output head always has a weight of its own
_PARTS = ("encoder", "decoder")  # models of two, each with a configuration of its own


def not_computed(config: Any, class_name: str = "ForCausalLM") -> list[str]:
    """Fields of a configuration that the model's Flax class passes over, each with its value.

    Args:
      config: of transformers, of a model that has a Flax class.
      class_name: of the model.
    """
    found = []
    for field, computed in _COMPUTED.get(config.model_type, {}).items():
        value = getattr(config, field, computed[0])
        if value not in computed:
            found.append(f"{field} {shown(value)} (it computes with {shown(computed[0])})")
    if config.model_type == "mistral" and config.sliding_window is None:
        found.append("sliding_window None (each token then sees itself alone)")
    has_own_head = class_name.endswith("ForCausalLM") and config.model_type in _UNTIED
    if has_own_head and config.tie_word_embeddings:
        found.append(
            "tie_word_embeddings True (its head is a weight of its own, which no file has)"
        )
    if unread := unread_rope(config):
        found.append(unread)
    for part in (getattr(config, name, None) for name in _PARTS):
        if hasattr(part, "model_type"):
            found += not_computed(part)
    return found


def unread_rope(config: Any) -> str:
    """What `rope_parameters`, as transformers 5 writes them, ask for, and 4.57 does not read.

    Args:
      config: of transformers, as the release that runs has read it.

    Returns:
      "" where it was read, or asks for nothing else.
    """
    asked, theta = getattr(config, "rope_parameters", None), getattr(config, "rope_theta", None)
    if not isinstance(asked, dict) or theta is None:  # release 5 has no field rope_theta
        return ""
    scaling = getattr(config, "rope_scaling", None)
    plain = asked.get("rope_type", "default") == "default" or scaling not in _PLAIN_ROPE
    if asked.get("rope_theta", theta) == theta and plain:
        return ""
    return (
        f"rope_parameters {shown(asked)} (written by transformers 5; 4.57 does not read them, in "
        f"PyTorch either, and computes with rope_theta {shown(theta)}: put them into config.json "
        "as rope_theta and rope_scaling)"
    )
