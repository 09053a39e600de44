"""google-tunix's DPOTrainer: the reference is the same model with its adapter off."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_llama import (
    TOKENIZER,
    adapted,
    base_model,
    leaves,
    move,
    only_the_adapter_moved,
    opens_in_peft,
)
from tunix.rl.utils import is_sharing_backbone
from tunix.sft.dpo.dpo_trainer import DataInput, DPOTrainer, DPOTrainingConfig, compute_logps
from tunix_pair import jax_logits

from randlora_jax import AdapterParam

pytestmark = pytest.mark.torch

PAIRS = [("say a", "aaaa", "bbbb"), ("say c", "cccc", "dddd")]
CONFIG = {"max_prompt_length": 8, "max_response_length": 6, "beta": 0.3, "eval_every_n_steps": 9}


def test_the_reference_is_the_model_without_its_adapter(base, tmp_path):
    model = adapted(base)
    plain = np.asarray(jax_logits(model))  # a fresh adapter adds nothing
    move(model)
    reference = nnx.merge(*nnx.split(model))
    reference.disable_adapter_layers()
    assert is_sharing_backbone(reference, model)
    np.testing.assert_array_equal(jax_logits(reference), plain)

    before = leaves(model)
    config = DPOTrainingConfig(**CONFIG, max_steps=4)
    trainer = DPOTrainer(model, reference, optax.adamw(1e-2), config, TOKENIZER)
    asked, chosen, rejected = map(list, zip(*PAIRS, strict=True))
    data = DataInput(prompts=asked, chosen_responses=chosen, rejected_responses=rejected)
    prepared = trainer._prepare_inputs(data)
    expected = compute_logps(
        base_model(base), prepared.input_ids, prepared.positions, prepared.attention_mask,
        prepared.logits_to_keep, prepared.completion_mask,
    )  # fmt: skip
    found = prepared.ref_chosen_logps, prepared.ref_rejected_logps
    np.testing.assert_array_equal(found, expected)
    trainer.train([data] * 4)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert losses[-1] < losses[0]
    only_the_adapter_moved(before, model)
    assert is_sharing_backbone(reference, model)
    np.testing.assert_array_equal(jax_logits(reference), plain)
    opens_in_peft(model, tmp_path)


def test_an_adapter_tuned_before_is_a_reference_that_stays(base):
    model = adapted(base)
    move(model)
    reference = nnx.clone(model)
    assert is_sharing_backbone(reference, model)
    tuned = np.asarray(jax_logits(model))
    config = DPOTrainingConfig(**CONFIG, max_steps=3)
    trainer = DPOTrainer(model, reference, optax.adamw(1e-2), config, TOKENIZER)
    asked, chosen, rejected = map(list, zip(*PAIRS, strict=True))
    data = DataInput(prompts=asked, chosen_responses=chosen, rejected_responses=rejected)
    trainer.train([data] * 3)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.05
    np.testing.assert_array_equal(jax_logits(reference), tuned)
    assert np.abs(jax_logits(model) - tuned).max() > 0.1 * tuned.std()


def test_what_is_off_has_gradients_of_zero_and_types_as_before(base):
    model = adapted(base)
    move(model)
    reference = nnx.merge(*nnx.split(model))
    reference.disable_adapter_layers()
    types = [
        [(path, type(leaf)) for path, leaf in nnx.iter_graph(m) if isinstance(leaf, nnx.Variable)]
        for m in (model, reference)
    ]
    assert types[0] == types[1]
    of_all = nnx.grad(lambda m: jax_logits(m).sum(), argnums=nnx.DiffState(0, AdapterParam))
    assert not any(np.any(x) for x in jax.tree.leaves(of_all(reference)))
    reference.enable_adapter_layers()
    np.testing.assert_array_equal(jax_logits(reference), jax_logits(model))
