"""google-tunix's sampler says what PyTorch says, before and after its weights are replaced."""

import numpy as np
import pytest
import torch
from flax import nnx
from tiny_llama import TOKENIZER, adapted, in_peft, is_default, leaves, move
from tunix.generate.sampler import CacheConfig, Sampler

pytestmark = pytest.mark.torch

ASKED, STEPS = "one two ", 5


def said_in_torch(theirs):
    """The next tokens, taken greedily, and what each was given: the logarithm of its chance."""
    asked = TOKENIZER(ASKED, return_tensors="pt")
    out = theirs.generate(
        **asked, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = out.sequences[0, asked.input_ids.shape[1] :]
    chances = torch.cat(out.logits).log_softmax(-1)
    return tokens.numpy(), chances[torch.arange(STEPS), tokens].numpy()


@pytest.mark.parametrize("sparse", [False, True])
def test_it_says_the_same_and_takes_trained_weights(sparse, base, tmp_path):
    model = adapted(base, sparse=sparse)
    theirs = in_peft(model, tmp_path / "fresh")
    cache = CacheConfig(cache_size=32, num_layers=1, num_kv_heads=2, head_dim=12)
    sampler = Sampler(model, TOKENIZER, cache)
    assert sampler.dtype == np.float32  # what its cache holds, though ternary bases are integers

    def said():
        out = sampler([ASKED], max_generation_steps=STEPS, return_logprobs=True, eos_tokens=[-1])
        return np.asarray(out.tokens[0]), np.asarray(out.logprobs[0])

    def same(found, expected):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)

    fresh = said()
    same(fresh, said_in_torch(theirs))
    learner = adapted(base, sparse=sparse)  # another model like this one, which is trained
    move(learner)
    before = leaves(sampler.transformer)
    sampler.transformer_state = nnx.state(learner, nnx.LoRAParam)
    trained = said()
    same(trained, said_in_torch(in_peft(learner, tmp_path / "trained")))
    assert np.abs(trained[1] - fresh[1]).max() >= 1e-2
    for path, array in leaves(sampler.transformer).items():
        assert np.array_equal(array, before[path]) != is_default(path)
