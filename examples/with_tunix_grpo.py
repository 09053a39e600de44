"""RandLoRA in google-tunix's RL cluster: GRPO; actor, reference and sampler share one base.

python examples/with_tunix_grpo.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax.sharding import Mesh
from peft import AutoPeftModelForCausalLM
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils

from randlora_jax import RandLoraConfig, get_peft_model

BASE, ADAPTER = "out/examples/tunix_grpo/base", "out/examples/tunix_grpo/adapter"
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
mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
base = params.create_model_from_safe_tensors(BASE, shape, mesh, dtype=jnp.float32)
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

rewards = []


def reward(prompts, completions, **_):
    """How many small letters an answer has."""
    found = [float(sum("a" <= c <= "z" for c in text)) for text in completions]
    rewards.append(np.mean(found))
    return found


training = RLTrainingConfig(actor_optimizer=optax.adamw(1e-2), eval_every_n_steps=99, max_steps=30)
rollout = RolloutConfig(
    max_tokens_to_generate=6, max_prompt_length=16, kv_cache_size=32, temperature=1.0
)
cluster = RLCluster(
    actor=model,
    reference=reference,
    tokenizer=tokenizer,
    cluster_config=ClusterConfig(
        role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
        training_config=training,
        rollout_config=rollout,
    ),
)
learner = GRPOLearner(cluster, GRPOConfig(num_generations=8, num_iterations=1), reward)
prompts = np.array(["a word:", "another word:", "one more:", "the last one:"])
learner.train([{"prompts": prompts}] * 30)
model.save_pretrained(ADAPTER)

theirs = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, dtype=torch.float32).eval()
ids = tokenizer(" ".join(prompts), return_tensors="np").input_ids
with torch.no_grad():
    expected = theirs(torch.tensor(ids)).logits.numpy()
mask = jnp.ones(ids.shape, bool)
positions, seen = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
apart = abs(np.asarray(model(ids, positions, None, seen)[0]) - expected).max()
apart /= abs(expected).max()
print(f"tunix GRPO: small letters in an answer: {rewards[-1]:.1f}, not {rewards[0]:.1f}; "
      f"logits in PyTorch PEFT within {apart:.1e}")  # fmt: skip
assert apart < 1e-5, "the adapter means something else in PyTorch"
