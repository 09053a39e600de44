"""RandLoRA in google-tunix's PeftTrainer: Qwen 3 learns to spell. Opens in PyTorch PEFT.

python examples/with_tunix.py
"""

import inspect

import jax.numpy as jnp
import numpy as np
import optax
import torch
from peft import AutoPeftModelForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from randlora_jax import RandLoraConfig, get_peft_model

BASE, ADAPTER = "out/examples/tunix/base", "out/examples/tunix/adapter"
sizes = {"vocab_size": 128, "num_hidden_layers": 2, "head_dim": 24, "rms_norm_eps": 1e-6}
sizes |= {"hidden_size": 96, "intermediate_size": 192, "initializer_range": 0.1}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 1e6}  # fixed in tunix
torch.manual_seed(0)
theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
theirs.save_pretrained(BASE)  # any checkpoint of Qwen 3

shape = qwen3.ModelConfig(
    num_layers=2,
    vocab_size=128,
    embed_dim=96,
    hidden_dim=192,
    num_heads=4,
    head_dim=24,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
)
base = params.create_model_from_safe_tensors(BASE, shape, dtype=jnp.float32)
config = RandLoraConfig(
    r=16,
    randlora_alpha=32,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    base_model_name_or_path=BASE,
)
model = get_peft_model(base, config)
model.print_trainable_parameters()


def model_inputs(batch):
    """What the trainer's loss calls the model with."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


text = np.array([ord(c) for c in inspect.getsource(qwen3) if c.isascii()], np.int32)  # any text
*read, unseen = text[: len(text) // 512 * 512].reshape(-1, 8, 64)
batches = [TrainingInput(ids, np.ones_like(ids, bool)) for ids in read]
training = TrainingConfig(
    eval_every_n_steps=50,
    max_steps=150,
    gradient_accumulation_steps=2,
    # checkpoint_root_directory="/where/to/go/on",  # holds the adapter and the optimizer alone
)
trainer = PeftTrainer(model, optax.adamw(1e-2), training).with_gen_model_input_fn(model_inputs)
trainer.train(batches * 5, [TrainingInput(unseen, np.ones_like(unseen, bool))])
costs = trainer.metrics_logger.get_metric_history("", "loss", "eval")
model.save_pretrained(ADAPTER)

theirs = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, dtype=torch.float32).eval()
with torch.no_grad():
    expected = theirs(torch.tensor(unseen).long()).logits.numpy()
mask = jnp.ones(unseen.shape, bool)
positions, seen = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
apart = abs(np.asarray(model(unseen, positions, None, seen)[0]) - expected).max()
apart /= abs(expected).max()
print(f"tunix SFT: an unseen letter costs {costs[-1]:.2f} nats, not {costs[0]:.2f}; "
      f"logits in PyTorch PEFT within {apart:.1e}")  # fmt: skip
assert apart < 1e-5, "the adapter means something else in PyTorch"
