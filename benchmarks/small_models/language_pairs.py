"""DeepMind gemma's and MaxText's models and their twins: these have no loader that is used here."""

import transformers

from small_models import deepmind_gemma, maxtext
from small_models.pair import LOCAL_AND_GLOBAL, TEXT, Pair


def gemma():
    config = transformers.GemmaConfig(**{**TEXT, "num_key_value_heads": 4})
    return Pair(deepmind_gemma.gemma(), "GemmaForCausalLM", config)


def gemma2():
    config = transformers.Gemma2Config(
        **TEXT,
        layer_types=LOCAL_AND_GLOBAL,
        sliding_window=64,
        query_pre_attn_scalar=12,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    return Pair(deepmind_gemma.gemma2(), "Gemma2ForCausalLM", config)


def gemma3():
    config = transformers.Gemma3TextConfig(
        **TEXT,
        layer_types=LOCAL_AND_GLOBAL,
        sliding_window=64,
        query_pre_attn_scalar=12,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    entry = deepmind_gemma.gemma3(global_base_frequency=1_000_000, global_scale_factor=8.0)
    return Pair(entry, "Gemma3ForCausalLM", config)


MAXTEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def qwen2(**changes):
    # three layers: as many as there are key heads, and a bias does not tell which axis is which
    said = {"decoder_block": "qwen2", "attention_bias": True, "base_num_decoder_layers": 3}
    sizes = {name: size for name, size in MAXTEXT.items() if name != "head_dim"}
    config = transformers.Qwen2Config(**{**sizes, "num_hidden_layers": 3})
    return Pair(maxtext.entry(as_nnx=True, **said, **changes), "Qwen2ForCausalLM", config)


def qwen3(kind="nnx", **changes):
    entry = maxtext.entry(**maxtext.KINDS[kind], **maxtext.QWEN, **changes)
    return Pair(entry, "Qwen3ForCausalLM", transformers.Qwen3Config(**MAXTEXT))


def experts(**changes):
    config = transformers.Qwen3MoeConfig(
        **MAXTEXT,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
    )
    entry = maxtext.entry(as_nnx=True, **maxtext.QWEN_MOE, norm_topk_prob=True, **changes)
    return Pair(entry, "Qwen3MoeForCausalLM", config)


PAIRS = {
    "DeepMind gemma, Gemma": gemma,
    "DeepMind gemma, Gemma 2": gemma2,
    "DeepMind gemma, Gemma 3": gemma3,
    "MaxText, Qwen 2, scanned": qwen2,
    "MaxText, Qwen 2, not scanned": lambda: qwen2(scan_layers=False),
    "MaxText, Qwen 3, scanned": qwen3,
    "MaxText, Qwen 3, not scanned": lambda: qwen3(scan_layers=False),
    "MaxText, Qwen 3, scanned, nnx in linen": lambda: qwen3("nnx in linen"),
    "MaxText, Qwen 3, scanned, linen": lambda: qwen3("linen"),
    "MaxText, Qwen 3, experts, scanned": experts,
    "MaxText, Qwen 3, experts, not scanned": lambda: experts(scan_layers=False),
}
