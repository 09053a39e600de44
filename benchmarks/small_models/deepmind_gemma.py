"""DeepMind's gemma."""

import jax.numpy as jnp

from small_models.entry import CodeBase, Entry, bound, ids


def gemma3(**changes):
    from gemma.gm.nn import _config, _modules, _transformer

    kinds = _modules.AttentionType
    settings = {
        "num_embed": 61,
        "embed_dim": 36,
        "hidden_dim": 52,
        "num_heads": 4,
        "head_dim": 12,
        "num_kv_heads": 2,
        "final_logit_softcap": None,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "use_qk_norm": True,
        "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL),
        "sliding_window_size": 64,
        "transpose_gating_einsum": True,
    }
    config = _config.TransformerConfig(**{**settings, **changes})
    module = _transformer.Transformer(config=config, dtype=jnp.float32, tokens="x")
    return Entry(bound(module, ids()), {"tokens": ids()}, lambda model, x: model(x).logits)


def gemma2():
    softcaps = {"final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0}
    return gemma3(use_qk_norm=False, transpose_gating_einsum=False, **softcaps)


def gemma():
    plain = dict.fromkeys(("use_qk_norm", "use_post_attn_norm", "use_post_ffw_norm"), False)
    return gemma3(transpose_gating_einsum=False, num_kv_heads=4, **plain)


BASE = CodeBase(
    "DeepMind gemma", "3.3.0", "linen", (), {"Gemma": gemma, "Gemma 2": gemma2, "Gemma 3": gemma3}
)
