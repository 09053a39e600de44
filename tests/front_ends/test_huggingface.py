"""A wrapped Hugging Face model is still the model."""

import jax
import numpy as np
import pytest
from families import FAMILIES, twins

from randlora_jax import RandLoraConfig, get_peft_model

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return twins("opt", tmp_path_factory.mktemp("opt"))


def adapted(pair, family="opt", **kwargs):
    config = RandLoraConfig(r=8, randlora_alpha=16, target_modules=FAMILIES[family][2], **kwargs)
    model = get_peft_model(pair.flax, config)
    before = model.params
    noise = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + noise.normal(0, 0.3, x.shape).astype("f"), before["randlora"]
    )
    model.params = {**before, "randlora": moved}
    return model, before


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_before_training_it_is_the_base_model_to_the_bit(family, apply, tmp_path):
    pair = twins(family, tmp_path)
    config = RandLoraConfig(r=8, target_modules=FAMILIES[family][2])
    model = get_peft_model(pair.flax, config, apply=apply)
    np.testing.assert_array_equal(pair.flax_logits(model), pair.flax_logits())
    run = lambda m, p: m(**pair.inputs, params=p).logits  # noqa: E731
    wrapped = jax.jit(lambda p: run(model, p))(model.params)
    np.testing.assert_array_equal(wrapped, jax.jit(lambda p: run(pair.flax, p))(pair.flax.params))


def test_generate_follows_the_adapter(opt):
    model, before = adapted(opt)
    prompt = opt.inputs["input_ids"][:, :4]
    settings = {"max_length": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": 2}
    base = opt.flax.generate(prompt, **settings).sequences
    np.testing.assert_array_equal(model.generate(prompt, params=before, **settings).sequences, base)
    found = model.generate(prompt, **settings).sequences
    assert not np.array_equal(found, base)
    # greedy decoding by hand, through the whole model each time
    ids = np.asarray(prompt)
    for _ in range(8):
        step = model(input_ids=ids).logits[:, -1].argmax(-1)
        ids = np.concatenate([ids, np.asarray(step)[:, None]], 1)
        if (ids == 2).any():
            break
    np.testing.assert_array_equal(found[:, : ids.shape[1]], ids)


def test_attributes_are_the_models(opt):
    model, _ = adapted(opt)
    assert model.config is opt.flax.config
    assert model.module is opt.flax.module
    ours = {"randlora", "randlora_frozen", "randlora_bases", "randlora_specs"}
    assert set(model.params) == {"params", *ours}
    with pytest.raises(AttributeError):
        model.nothing_of_the_kind  # noqa: B018
    assert opt.flax.params.keys() == model.params["params"].keys()  # the base is untouched


def test_its_module_is_applied_as_any_linen_module(opt):
    model, _ = adapted(opt)
    ids, mask = opt.inputs["input_ids"], opt.inputs["attention_mask"]
    positions = mask.cumsum(1) * mask - 1  # as OPT counts them
    logits = model.apply(model.variables, ids, mask, positions).logits
    np.testing.assert_allclose(logits, model(**opt.inputs).logits, atol=1e-5)


def test_dropout_rng_turns_adapter_dropout_on(opt):
    model, _ = adapted(opt, randlora_dropout=0.5)
    run = lambda **kwargs: np.asarray(model(**opt.inputs, **kwargs).logits)  # noqa: E731
    first = run(dropout_rng=jax.random.key(0))
    np.testing.assert_array_equal(run(dropout_rng=jax.random.key(0)), first)
    assert not np.allclose(first, run(dropout_rng=jax.random.key(1)))
    np.testing.assert_array_equal(run(), run())


def test_trainable_parameters_are_counted_as_in_peft(opt, capsys):
    import peft

    model, _ = adapted(opt)
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    theirs = peft.get_peft_model(
        opt.torch, peft.RandLoraConfig(r=8, target_modules=FAMILIES["opt"][2])
    )
    theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out
