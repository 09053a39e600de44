"""Small models with vision and language, whose files name their layers otherwise than the class."""

import torch
import transformers as T

_WIDE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {**_WIDE, "vocab_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2}
_EYES = {**_WIDE, "image_size": 16, "patch_size": 8}
_IMAGE = {"image_token_index": 4}


def _clip():
    return T.CLIPVisionConfig(**_EYES, projection_dim=16)


def _siglip():
    return T.SiglipVisionConfig(**_EYES, projection_dim=24)


def _llava(config, text=None, **more):
    return config(
        vision_config=_clip(), text_config=text or T.LlamaConfig(**_TEXT), **_IMAGE, **more
    )


def _qwen(config):
    rope = {"type": "mrope", "mrope_section": [1, 1, 1]}
    if config is T.Qwen2VLConfig:
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 24}
    else:
        vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 24, "intermediate_size": 20}
    vision |= {"num_heads": 2, "patch_size": 4}
    return config(text_config={**_TEXT, "rope_scaling": rope}, vision_config=vision)


def _gemma3():
    text = T.Gemma3TextConfig(**_TEXT, head_dim=6)
    return T.Gemma3Config(text_config=text, vision_config=_siglip(), mm_tokens_per_image=4)


def _paligemma():
    text = T.GemmaConfig(**_TEXT, head_dim=6)
    return T.PaliGemmaConfig(text_config=text, vision_config=_siglip(), projection_dim=24, **_IMAGE)


def _mistral3():
    vision = T.PixtralVisionConfig(**_EYES)
    text = T.MistralConfig(**_TEXT, head_dim=6)
    return T.Mistral3Config(text_config=text, vision_config=vision, **_IMAGE)


# class and configuration
MODELS = {
    "llava": ("LlavaForConditionalGeneration", lambda: _llava(T.LlavaConfig)),
    "llava_next": ("LlavaNextForConditionalGeneration", lambda: _llava(T.LlavaNextConfig)),
    "vipllava": ("VipLlavaForConditionalGeneration", lambda: _llava(T.VipLlavaConfig)),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", lambda: _qwen(T.Qwen2VLConfig)),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", lambda: _qwen(T.Qwen2_5_VLConfig)),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "paligemma": ("PaliGemmaForConditionalGeneration", _paligemma),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
}


def model(family):
    """One of `MODELS`, with random weights."""
    torch.manual_seed(0)
    name, config = MODELS[family]
    return getattr(T, name)(config()).eval()
