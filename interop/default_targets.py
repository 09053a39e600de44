"""The layers PEFT adapts where a configuration names none, by Hugging Face model type.

Data from PEFT 0.21.2 (TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING).
"""

_QUERY_VALUE = ("query", "value")
_Q_V_PROJ = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)

DEFAULT_TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    "bart": _Q_V_PROJ,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": _FUSED,
    "btlm": ("c_proj", "c_attn"),
    "chatglm": _FUSED,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _Q_V_PROJ,
    "gemma2": _Q_V_PROJ,
    "gemma3_text": _Q_V_PROJ,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _Q_V_PROJ,
    "gpt_neox": _FUSED,
    "gptj": _Q_V_PROJ,
    "layoutlm": _QUERY_VALUE,
    "llama": _Q_V_PROJ,
    "llama4": _Q_V_PROJ,
    "mistral": _Q_V_PROJ,
    "mixtral": _Q_V_PROJ,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _Q_V_PROJ,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": _Q_V_PROJ,
    "qwen3": _Q_V_PROJ,
    "RefinedWeb": _FUSED,
    "RefinedWebModel": _FUSED,
    "roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
    "stablelm": _Q_V_PROJ,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
}
