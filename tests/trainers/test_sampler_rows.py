"""google-tunix's sampler, each prompt of a batch with an adapter of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from many_nets import move
from tiny_llama import SETTINGS, TOKENIZER, base_model
from tunix.generate.sampler import CacheConfig, Sampler

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:PEFT cannot open these adapters in one PyTorch model"),
]

ASKED, STEPS = ["one two ", "three", "four five six", "seven "], 5
NAMES = ["a", "b", "__base__", "c"]


def several(folder):
    """A tunix Llama with three adapters, one of which trains the head whole."""
    model = get_peft_model(base_model(folder), RandLoraConfig(**SETTINGS), adapter_name="a")
    model.add_adapter("b", RandLoraConfig(**SETTINGS | {"r": 4, "randlora_alpha": 20}))
    whole = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    model.add_adapter("c", RandLoraConfig(**SETTINGS | whole))
    for seed, name in enumerate("abc"):
        move(model, name, seed, by=0.1)
    return model


def said(sampler):
    """By prompt: the next tokens, taken greedily, and the logarithms of their chances."""
    out = sampler(ASKED, max_generation_steps=STEPS, return_logprobs=True, eos_tokens=[-1])
    return np.asarray(out.tokens), np.asarray(out.logprobs)


def test_each_prompt_is_answered_by_its_own_adapter_and_a_swap_compiles_nothing(
    base, tmp_path, compiled, monkeypatch
):
    model = several(base)
    model.save_pretrained(tmp_path)
    cache = CacheConfig(cache_size=32, num_layers=1, num_kv_heads=2, head_dim=12)
    plain = Sampler(base_model(base), TOKENIZER, cache)
    each = {"__base__": said(plain)}
    for name in ("a", "b", "c"):  # alone, in a plain model's kernels
        merged = RandLoraModel.from_pretrained(base_model(base), tmp_path / name, adapter_name=name)
        plain.transformer_state = nnx.variables(merged.merge_and_unload())
        each[name] = said(plain)

    model.stack_adapters(3)
    model.set_rows(NAMES)
    sampler = Sampler(model, TOKENIZER, cache)

    def answers(names, holds=None):
        """How many programs were compiled for answers that are those of the names alone."""
        model.set_rows(names)
        before = compiled()
        tokens, chances = said(sampler)
        made = compiled() - before
        for i, name in enumerate(names):
            expected = each[(holds or {}).get(name, name)]
            np.testing.assert_array_equal(tokens[i], expected[0][i])
            np.testing.assert_allclose(chances[i], expected[1][i], rtol=0, atol=1e-4)
        return made

    assert answers(NAMES) > 0
    assert answers(["c", "__base__", "a", "b"]) == 0
    with pytest.raises(AssertionError):
        answers(["c", "__base__", "a", "b"], {"c": "a", "a": "c"})
    monkeypatch.chdir(tmp_path)
    model.hotswap_adapter("c", "a")
    assert answers(NAMES, {"a": "c"}) == 0
    model.load_adapter("a", "new")
    assert answers(["new", "a", "b", "__base__"], {"new": "a", "a": "c"}) == 0
    model.set_rows(["__base__"] * 4)
    model.delete_adapter("new")
    assert answers(["__base__"] * 4) == 0
    model.set_scale("b", 0.0)
    assert answers(["b", "__base__", "c", "b"], {"b": "__base__"}) == 0
    graph, state = nnx.split(model)
    sampler = Sampler(nnx.merge(graph, jax.tree.map(jnp.copy, state)), TOKENIZER, cache)
    model.set_scale("b", 1.0)
    model.set_rows(NAMES)
    sampler.transformer_state = nnx.variables(model)  # it had arrays of its own
    answers(NAMES, {"a": "c"})
    counts = []
    for name in ("b", "a"):  # all rows alike: another program, once
        model.set_adapter(name)
        before = compiled()
        np.testing.assert_array_equal(said(sampler)[0], each[{"a": "c"}.get(name, name)][0])
        counts.append(compiled() - before)
    assert counts[0] > 0
    assert counts[1] == 0
