"""QRandLoRA: tunix's Llama quantised by qwix, trained by its trainer, and what PEFT makes of it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from test_sft import batches, inputs
from tiny_llama import SETTINGS, base_model, in_peft, leaves, only_the_adapter_moved
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig
from tunix_pair import jax_logits, torch_logits

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch


def quantised(base, kind):
    model = base_model(base)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=kind, tile_size=4)
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_trained_beside_rounded_weights_and_opened_on_the_true_ones(base, kind, tmp_path):
    config = RandLoraConfig(**SETTINGS, base_model_name_or_path=str(base))
    model = get_peft_model(quantised(base, kind), config)
    plain = jax_logits(model)
    before = leaves(model)
    every = TrainingConfig(eval_every_n_steps=100)
    trainer = PeftTrainer(model, optax.adamw(3e-2), every).with_gen_model_input_fn(inputs)
    trainer.train(batches(6))
    only_the_adapter_moved(before, model)
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    ours = jax_logits(model)
    assert losses[-1] < losses[0] and (ours - plain).std() > 0.1 * plain.std()

    expected = torch_logits(in_peft(model, tmp_path / "adapter"))
    largest = np.abs(expected).max()
    there = jax_logits(RandLoraModel.from_pretrained(base_model(base), tmp_path / "adapter"))
    assert np.abs(there - expected).max() <= 1e-5 * largest
    rounded = np.abs(ours - expected).max() / largest
    print(f"{kind}: the rounding of the weights changes logits by {rounded:.4f} of the largest")
    assert rounded > 1e-3, "weights are not rounded at all"

    merged = model.merge_and_unload(dequantize=True)
    assert np.abs(jax_logits(merged) - ours).max() <= 1e-5 * largest
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves(merged).values())
