"""The methods and attributes of a wrapped Hugging Face model, `generate` among them."""

import copy
import pickle

import jax
import numpy as np
import pytest

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

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


def gpt2():
    """A tiny random one."""
    import transformers

    sizes = {"vocab_size": 60, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **tokens, initializer_range=0.5)
    return transformers.FlaxGPT2LMHeadModel(config)


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


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_are_not_the_batchs_are_refused_before_a_search(beams):
    model = adapted(gpt2(), ["c_attn"], ["a", "b"])
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    settings = {"max_length": 5, "num_beams": beams}
    for names in (["a", "a", "b", "__base__"], ["a"]):
        with pytest.raises(ConfigError, match=f"has {len(names)}: .* of input_ids, which has 2"):
            model.generate(ids, adapter_names=names, **settings)
        with pytest.raises(ConfigError, match=f"has {len(names)}: .* of input_ids, which has 2"):
            model.generate(input_ids=ids, adapter_names=names, **settings)
    model.stack_adapters()
    model.set_rows(["a", "b", "a", "b"])
    with pytest.raises(ConfigError, match=r"has 4: .* of input_ids, which has 2"):
        model.generate(ids, **settings)
    model.set_rows(["a", "b"])
    assert model.generate(ids, **settings).sequences.shape == (2, 5)


def test_an_attribute_that_is_set_is_the_models():
    from transformers import GenerationConfig

    base = gpt2()
    model = adapted(base, ["c_attn"])
    short = GenerationConfig(max_new_tokens=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.generation_config = short
    assert base.generation_config is short
    assert model.generate(np.array([[5, 6, 7]])).sequences.shape == (1, 5)
    model.note = 3
    assert model.note == base.note == 3
    del model.note
    assert not hasattr(base, "note")
    with pytest.raises(AttributeError):  # of the model, which has no setter for it
        model.config = base.config
    for again in (copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert again.generation_config.max_new_tokens == 2
        assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
        again.params = model.params  # ours, and not the model's
        assert "randlora" not in again.model.params


def test_params_are_taken_by_position_too():
    model = adapted(gpt2(), ["c_attn"])
    ids = np.array([[5, 6, 7]])
    moved = jax.tree.map(lambda x: x * 2, model.params["randlora"])
    params = {**model.params, "randlora": moved}
    by_name = model(ids, params=params, output_hidden_states=True)
    assert np.abs(by_name.logits - model(ids).logits).max() > 1e-2
    mask = np.ones_like(ids)
    # those after them keep their places, output_hidden_states among them
    before = (ids, mask, None, None, None)
    by_place = model(*before, params, None, None, False, None, True)
    np.testing.assert_array_equal(by_place.logits, by_name.logits)
    assert len(by_place.hidden_states) == len(by_name.hidden_states) == 2
    with pytest.raises(TypeError, match="multiple values for argument 'params'"):
        model(*before, params, params=params)


def test_methods_that_make_base_params_are_refused_where_adapters_are():
    base = gpt2()
    model = adapted(base, ["c_attn"])
    for name in ("to_bf16", "to_fp16", "to_fp32"):
        with pytest.raises(ConfigError, match=f"{name} gives params of the base .*before wrapping"):
            getattr(model, name)(model.params)
    with pytest.raises(ConfigError, match="init_weights gives params of the base model"):
        model.init_weights(jax.random.key(0), (1, 3))
    # what the error says of the wrapped model works
    model.params = {**model.params, "params": model.model.to_bf16(model.params["params"])}
    assert {x.dtype for x in jax.tree.leaves(model.params["params"])} == {jax.numpy.bfloat16.dtype}
    assert np.isfinite(np.asarray(model(np.array([[5, 6]])).logits)).all()
