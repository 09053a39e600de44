"""The methods and attributes of a wrapped Hugging Face model, `generate` among them."""

import jax
import numpy as np
import pytest

from randlora_jax import RandLoraConfig, get_peft_model

pytestmark = pytest.mark.torch


def whisper():
    """A tiny random one, whose `generate` is of its own class, and sounds for it."""
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=1.0,
        tie_word_embeddings=False,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.FlaxWhisperForConditionalGeneration(config, input_shape=(1, 8, 20))
    return model, jax.random.normal(jax.random.key(3), (2, 8, 20))


def adapted(model, targets, names=("default",)):
    """Wrapped, with adapters that move it."""
    config = RandLoraConfig(r=4, randlora_alpha=64, target_modules=targets, init_weights=False)
    first, *more = names
    wrapped = get_peft_model(model, config, first, rngs=jax.random.key(1))
    for i, name in enumerate(more):
        wrapped.add_adapter(name, config, rngs=jax.random.key(2 + i))
    return wrapped


def test_whispers_own_generate_follows_the_adapter():
    base, sounds = whisper()
    plain = base.params
    model = adapted(base, ["q_proj", "v_proj", "fc1", "fc2"])

    def tokens(of=model, **kwargs):
        return np.asarray(of.generate(sounds, max_length=6, **kwargs).sequences)

    found, unadapted = tokens(params=model.params), tokens(base, params=plain)
    assert not (unadapted == found).all(1).any()
    # each is what the whole model finds most likely after those before it
    best = model(sounds, decoder_input_ids=found).logits.argmax(-1)
    assert not (found == base.config.eos_token_id).any()
    np.testing.assert_array_equal(found[:, 1:], best[:, :-1])
    by_row = tokens(adapter_names=["default", "__base__"])
    np.testing.assert_array_equal(by_row, [found[0], unadapted[1]])
