"""jax-ml/bonsai."""

import dataclasses
import importlib

import jax.numpy as jnp
from flax import nnx

from small_models.entry import CodeBase, Entry, ids, normal


def _package(name):
    return importlib.import_module(f"bonsai.models.{name}.modeling")


def qwen3_config():
    return _package("qwen3").ModelConfig(
        num_layers=2,
        vocab_size=61,
        emb_dim=36,
        mlp_dim=52,
        num_heads=4,
        head_dim=12,
        num_kv_heads=2,
        rope_theta=1000000,
        rope_scaling_factor=8.0,
        local_rope_theta=1e4,
        norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def qwen3():
    m, config = _package("qwen3"), qwen3_config()

    def call(model, tokens):
        cache = m.init_cache(config, 3, 8, 0, jnp.float32)
        return model(tokens, cache=cache, segment_ids=jnp.ones_like(tokens))

    return Entry(m.Qwen3(config, rngs=nnx.Rngs(0)), {"tokens": ids()}, call)


def gemma3():
    m = _package("gemma3")
    seen = m.VisionConfig(
        attention_dropout=0.0,
        hidden_size=24,
        image_size=16,
        intermediate_size=40,
        layer_norm_eps=1e-6,
        num_attention_heads=2,
        num_channels=3,
        num_hidden_layers=2,
        patch_size=4,
        vision_use_head=False,
    )
    text = m.TextConfig(
        attention_bias=False,
        attention_dropout=0.0,
        head_dim=12,
        hidden_size=36,
        intermediate_size=52,
        layer_types=[m.AttentionMode.SLIDE, m.AttentionMode.FULL],
        max_position_embeddings=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_full_factor=8.0,
        rope_full_theta=1e6,
        rope_slide_factor=1.0,
        rope_slide_theta=1e4,
        sliding_window=64,
        vocab_size=61,
        norm_dtype=jnp.float32,
    )
    config = m.ModelConfig(
        vision_config=seen,
        text_config=text,
        mm_tokens_per_image=4,
        dtype="float32",
        final_logit_softcapping=None,
    )

    def call(model, tokens, images, kinds):
        cache = m.init_cache(config, 2, 8, 0, jnp.float32)
        ones = jnp.ones_like(tokens)
        return model(tokens, images, cache=cache, segment_ids=ones, token_type_ids=kinds)

    kinds = jnp.zeros((2, 8), int).at[:, 1:5].set(1)
    inputs = {"tokens": ids(2), "images": normal(2, 16, 16, 3), "kinds": kinds}
    return Entry(m.Gemma3Model(config, rngs=nnx.Rngs(0)), inputs, call)


def vit_config():
    return _package("vit").ModelConfig(
        image_size=(16, 16),
        patch_size=(4, 4),
        num_channels=3,
        hidden_dim=24,
        attn_dropout_prob=0.0,
        dropout_prob=0.0,
        num_heads=2,
        mlp_dim=40,
        eps=1e-12,
        num_layers=2,
        num_labels=5,
    )


def vit():
    m, config = _package("vit"), vit_config()

    def call(model, images):
        return model(images, rngs=None)

    model = m.ViTClassificationModel(config, rngs=nnx.Rngs(0))
    return Entry(model, {"images": normal(2, 16, 16, 3)}, call)


def dinov3():
    m = _package("dinov3")
    config = m.ModelConfig(
        patch_size=(4, 4),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        use_gated_mlp=True,
        hidden_act="silu",
    )

    def call(model, images):
        return model(images)["last_hidden_state"]

    model = m.Dinov3ViTModel(config, rngs=nnx.Rngs(0))
    return Entry(model, {"images": normal(2, 3, 16, 16)}, call)


def umt5():
    m = _package("umt5")
    config = m.ModelConfig(
        vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = m.UMT5Model(config, rngs=nnx.Rngs(0))
    model.eval()

    def call(model, tokens):
        mask = jnp.ones_like(tokens)
        return model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens)

    return Entry(model, {"tokens": ids()}, call)


def vjepa2():
    m = _package("vjepa2")
    config = m.ModelConfig(
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        crop_size=32,
        frames_per_clip=4,
        num_pooler_layers=1,
        num_labels=5,
    )

    def call(model, video):
        return model(video)["logits"]

    model = m.VJEPA2ForVideoClassification(config, rngs=nnx.Rngs(0))
    said = "optional=['vjepa2/predictor/.*']"  # a classifier does not predict
    return Entry(model, {"video": normal(2, 4, 32, 32, 3)}, call, said)


def mamba2():
    m = _package("mamba2")
    config = m.ModelConfig(
        vocab_size=61,
        hidden_size=32,
        state_size=16,
        head_dim=16,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )

    def call(model, tokens):
        return model(tokens)["logits"]

    said = "target_modules=['in_proj', 'lm_head']"  # PEFT refuses out_proj in this family
    return Entry(m.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), {"tokens": ids()}, call, said)


def whisper_config():
    return dataclasses.replace(
        _package("whisper").ModelConfig.whisper_tiny(),
        d_model=24,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_ffn_dim=40,
        encoder_ffn_dim=40,
        decoder_layers=2,
        encoder_layers=2,
        num_hidden_layers=2,
        max_source_positions=8,
        max_target_positions=10,
        max_length=10,
        num_mel_bins=6,
        vocab_size=61,
    )


def whisper():
    m, config = _package("whisper"), whisper_config()

    def call(model, sound, tokens):
        mask = jnp.tril(jnp.ones((8, 8)))[None, None]
        return model.decoder(tokens, mask, model.encoder(sound), None, False)

    model = m.Whisper(config, rngs=nnx.Rngs(0))
    return Entry(model, {"sound": normal(3, 16, 6), "tokens": ids()}, call)


BASE = CodeBase(
    "jax-ml/bonsai",
    "3628425",
    "nnx",
    ("bonsai",),
    {
        "Qwen 3": qwen3,
        "Gemma 3, vision": gemma3,
        "ViT": vit,
        "DINOv3": dinov3,
        "UMT5": umt5,
        "V-JEPA 2": vjepa2,
        "Mamba 2": mamba2,
        "Whisper": whisper,
    },
)
