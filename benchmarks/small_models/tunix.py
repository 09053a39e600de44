"""google-tunix."""

import importlib.util
import sys
import types

import jax.numpy as jnp
from flax import nnx

from small_models.entry import CodeBase, Entry, ids, normal

SIZES = {
    "num_layers": 2,
    "embed_dim": 36,
    "hidden_dim": 52,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 12,
}


def _package(name):
    """A module of ``tunix.models``, without the trainers that tunix itself imports first."""
    if "tunix" not in sys.modules:
        found = importlib.util.find_spec("tunix")
        sys.modules["tunix"] = package = types.ModuleType("tunix")
        package.__path__ = list(found.submodule_search_locations)
    return importlib.import_module(f"tunix.models.{name}")


def _entry(model, tokens=None, **more):
    tokens = ids() if tokens is None else tokens
    rows, length = tokens.shape
    inputs = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "mask": jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (rows, length, length)
        ),
    }

    def call(model, tokens, positions, mask, **more):
        return model(tokens, positions, None, mask, **more)[0]

    if not more:
        return Entry(model, inputs, call)

    def images(model, t, p, mask, images):
        return call(model, t, p, mask, images=images)

    return Entry(model, inputs | more, images)


def llama3():
    m = _package("llama3.model")
    config = m.ModelConfig(**SIZES, vocab_size=61, rope_theta=1_000_000, norm_eps=1e-6)
    return _entry(m.Llama3(config, rngs=nnx.Rngs(0)))


def qwen2():
    m = _package("qwen2.model")
    config = m.ModelConfig(**SIZES, vocab_size=61, rope_theta=1_000_000, norm_eps=1e-6)
    return _entry(m.Qwen2(config, rngs=nnx.Rngs(0)))


def qwen3(**experts):
    m = _package("qwen3.model")
    config = m.ModelConfig(**SIZES, vocab_size=61, rope_theta=1_000_000, norm_eps=1e-6, **experts)
    return _entry(m.Qwen3(config, rngs=nnx.Rngs(0)))


def qwen3_moe():
    return qwen3(num_experts=4, num_experts_per_tok=2)


def gemma():
    m = _package("gemma.model")
    config = m.ModelConfig(
        **SIZES,
        num_embed=61,
        final_logit_softcap=None,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attention_types=(m.AttentionType.GLOBAL,) * 2,
    )
    return _entry(m.Gemma(config, rngs=nnx.Rngs(0)))


def gemma2():
    m = _package("gemma.model")
    config = m.ModelConfig(
        **SIZES,
        num_embed=61,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        sliding_window_size=64,
        attention_types=(m.AttentionType.LOCAL_SLIDING, m.AttentionType.GLOBAL),
    )
    return _entry(m.Gemma(config, rngs=nnx.Rngs(0)))


def gemma3(tokens=None, vision=None, **more):
    m = _package("gemma3.model")
    config = m.ModelConfig(
        **SIZES,
        num_embed=61,
        sliding_window_size=64,
        vision_config=vision,
        param_dtype=jnp.float32,
    )
    return _entry(m.Gemma3(config, rngs=nnx.Rngs(0)), tokens, **more)


def gemma3_vision():
    seen = _package("gemma3.vision").SigLIPConfig(
        num_mm_tokens_per_image_prepool=16,
        num_mm_tokens_per_image=4,
        image_height=16,
        image_width=16,
        patch_size=(4, 4),
        width=24,
        depth=2,
        mlp_dim=40,
        num_heads=2,
        soft_token_placeholder=60,
    )
    tokens = ids().at[:, 1:5].set(60)
    return gemma3(tokens, seen, images=normal(3, 1, 16, 16, 3))


BASE = CodeBase(
    "google-tunix",
    "0.1.7",
    "nnx",
    (),
    {
        "Llama 3": llama3,
        "Qwen 2": qwen2,
        "Qwen 3": qwen3,
        "Qwen 3, experts": qwen3_moe,
        "Gemma": gemma,
        "Gemma 2": gemma2,
        "Gemma 3": gemma3,
        "Gemma 3, vision": gemma3_vision,
    },
)
