"""RandLoRA in google-tunix's DPOTrainer: the reference is the model, its adapter off.

python examples/with_tunix_dpo.py
"""

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from peft import AutoPeftModelForCausalLM
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import utils
from tunix.sft.dpo.dpo_trainer import DataInput, DPOTrainer, DPOTrainingConfig

from randlora_jax import RandLoraConfig, get_peft_model

BASE, ADAPTER = "out/examples/tunix_dpo/base", "out/examples/tunix_dpo/adapter"
tokenizer = ByT5Tokenizer(extra_ids=0)  # a token a byte
sizes = {"vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 192}
sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
sizes |= {"head_dim": 24, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "initializer_range": 0.1}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(BASE)  # any checkpoint of Llama 3

shape = llama3.ModelConfig(
    num_layers=2,
    vocab_size=len(tokenizer),
    embed_dim=96,
    hidden_dim=192,
    num_heads=4,
    head_dim=24,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-5,
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
reference = nnx.merge(*nnx.split(model))  # a second model of the same arrays
reference.disable_adapter_layers()

words = ["amber", "birch", "cedar", "dahlia", "elder", "fern", "grass", "hazel", "iris", "juniper"]
pairs = [(f"a plant: {i}", words[i % 10], words[i % 10].upper()) for i in range(80)]


def batch(pairs):
    """Prompts, the better answers, the worse ones."""
    return DataInput(*map(list, zip(*pairs, strict=True)))


training = DPOTrainingConfig(
    beta=0.1, max_prompt_length=16, max_response_length=8, eval_every_n_steps=20, max_steps=60
)
trainer = DPOTrainer(model, reference, optax.adamw(1e-2), training, tokenizer)
read = [batch(pairs[i : i + 8]) for i in range(0, 64, 8)]
trainer.train(read * 8, [batch(pairs[64:])])
right = trainer.metrics_logger.get_metric_history("", "rewards/accuracy", "eval")[-1]
model.save_pretrained(ADAPTER)

theirs = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, dtype=torch.float32).eval()
ids = tokenizer(" ".join(words), return_tensors="np").input_ids
with torch.no_grad():
    expected = theirs(torch.tensor(ids)).logits.numpy()
mask = jnp.ones(ids.shape, bool)
positions, seen = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
apart = abs(np.asarray(model(ids, positions, None, seen)[0]) - expected).max()
apart /= abs(expected).max()
print(f"tunix DPO: prefers the better of two in {right:.2f} of unseen pairs; "
      f"logits in PyTorch PEFT within {apart:.1e}")  # fmt: skip
assert apart < 1e-5, "the adapter means something else in PyTorch"
