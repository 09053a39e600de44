"""jax-ml/bonsai: language, vision and speech models (flax.nnx) whose twins are in transformers.

Most are made of flax's own layers under the twin's names, so that only the twin is to be said.
"""

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models.known.entry import Entries, KnownModel, twin
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table
from randlora_jax.models.names import Rules

_DENSE = LayerType(KernelLayout("i o"))

_QWEN_3: Rules = {
    r"layers/(\d+)/attn/([qkvo]_proj|[qk]_norm)": r"model.layers.\1.self_attn.\2",
    r"layers/(\d+)/mlp/(\w+)": r"model.layers.\1.mlp.\2",
    r"layers/(\d+)/(\w+_layernorm)": r"model.layers.\1.\2",
    "embedder": "model.embed_tokens",
    "final_norm": "model.norm",
}

_GEMMA_3: Rules = {
    r"language_model/layers/(\d+)/(\w+)/(\w+)": r"model.language_model.layers.\1.\2.\3",
    r"language_model/layers/(\d+)/(\w+)": r"model.language_model.layers.\1.\2",
    "language_model/norm": "model.language_model.norm",
    "embed_tokens/weight": "model.language_model.embed_tokens",
    r"vision_tower/encoder/layers/(\d+)/(\w+)/(\w+)": (
        r"model.vision_tower.vision_model.encoder.layers.\1.\2.\3"
    ),
    r"vision_tower/encoder/layers/(\d+)/(\w+)": (
        r"model.vision_tower.vision_model.encoder.layers.\1.\2"
    ),
    r"vision_tower/embeddings/(\w+)": r"model.vision_tower.vision_model.embeddings.\1",
    "vision_tower/post_layernorm": "model.vision_tower.vision_model.post_layernorm",
    r"multi_modal_projector/(\w+)": r"model.multi_modal_projector.\1",
}

_VIT: Rules = {
    r"layers/(\d+)/attention/(query|key|value)": r"vit.encoder.layer.\1.attention.attention.\2",
    r"layers/(\d+)/attention/out": r"vit.encoder.layer.\1.attention.output.dense",
    r"layers/(\d+)/linear1": r"vit.encoder.layer.\1.intermediate.dense",
    r"layers/(\d+)/linear2": r"vit.encoder.layer.\1.output.dense",
    r"layers/(\d+)/(layernorm_\w+)": r"vit.encoder.layer.\1.\2",
    "pos_embeddings/projection": "vit.embeddings.patch_embeddings.projection",
    "ln": "vit.layernorm",
}

_WHISPER: Rules = {
    r"(\w+)/layers/(\d+)/(\w+_attn)/([qkv])\w+": r"model.\1.layers.\2.\3.\4_proj",
    r"(\w+)/layers/(\d+)/(\w+_attn)/out": r"model.\1.layers.\2.\3.out_proj",
    r"(\w+)/layers/(\d+)/(\w+)": r"model.\1.layers.\2.\3",
    r"(\w+)/(\w+)": r"model.\1.\2",
}

_MAMBA_2: Rules = {
    "backbone/embedder": "backbone.embeddings",
    "backbone/final_norm": "backbone.norm_f",
    r"backbone/layers/(\d+)/mixer/conv1d/conv": r"backbone.layers.\1.mixer.conv1d",
}

# The twin is code on the hub, not in transformers.
_LLADA: Rules = {
    r"blocks/(\d+)/(\w+)": r"model.transformer.blocks.\1.\2",
    r"(ff_out|ln_f|wte)": r"model.transformer.\1",
}

# Input and output embedding of models that see.
_SEEING = "model.language_model.embed_tokens", "lm_head"

_SHARDED: Table = {
    f"bonsai.models.{package}.modeling.ShardedLinear": _DENSE for package in ("llada", "qwen3_vl")
}

ENTRIES: Entries = {
    "bonsai.models.qwen3.modeling.Qwen3": KnownModel(
        _QWEN_3, info=twin("Qwen3ForCausalLM", "qwen3")
    ),
    "bonsai.models.gemma3.modeling.Gemma3Model": KnownModel(
        _GEMMA_3, info=twin("Gemma3ForConditionalGeneration", "gemma3", tied=_SEEING)
    ),
    "bonsai.models.qwen3_vl.modeling.Qwen3VLForConditionalGeneration": KnownModel(
        layer_types=_SHARDED,
        info=twin("Qwen3VLForConditionalGeneration", "qwen3_vl", same_paths=True, tied=_SEEING),
    ),
    "bonsai.models.llada.modeling.LLaDAModel": KnownModel(_LLADA, layer_types=_SHARDED),
    "bonsai.models.mamba2.modeling.Mamba2ForCausalLM": KnownModel(
        _MAMBA_2, info=twin("Mamba2ForCausalLM", "mamba2", tied=("backbone.embeddings", "lm_head"))
    ),
    "bonsai.models.umt5.modeling.UMT5Model": KnownModel(
        info=twin("UMT5ForConditionalGeneration", "umt5", same_paths=True)
    ),
    "bonsai.models.umt5.modeling.UMT5EncoderModel": KnownModel(
        info=twin("UMT5EncoderModel", "umt5", head=False, same_paths=True)
    ),
    "bonsai.models.vit.modeling.ViTClassificationModel": KnownModel(
        _VIT, info=twin("ViTForImageClassification", "vit", head=False)
    ),
    "bonsai.models.dinov3.modeling.Dinov3ViTModel": KnownModel(
        info=twin("DINOv3ViTModel", "dinov3_vit", head=False, same_paths=True)
    ),
    "bonsai.models.vjepa2.modeling.VJEPA2ForVideoClassification": KnownModel(
        info=twin("VJEPA2ForVideoClassification", "vjepa2", head=False, same_paths=True)
    ),
    "bonsai.models.whisper.modeling.Whisper": KnownModel(
        _WHISPER,
        info=twin(
            "WhisperForConditionalGeneration",
            "whisper",
            tied=("model.decoder.embed_tokens", "proj_out"),
        ),
    ),
}
