"""RandLoRA on google-tunix's Qwen 3, which learns to spell; the adapter opens in PyTorch PEFT.

.venv-tunix/bin/python examples/with_tunix.py      (`make examples` makes that environment)
"""

import inspect

import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from peft import AutoPeftModelForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

BASE, ADAPTER = "out/examples/tunix/base", "out/examples/tunix/adapter"
rope = {"rope_type": "default", "rope_theta": 1e6}  # fixed in tunix
sizes = {"vocab_size": 128, "num_hidden_layers": 2, "head_dim": 24, "rms_norm_eps": 1e-6}
sizes |= {"hidden_size": 96, "intermediate_size": 192, "initializer_range": 0.1}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
torch.manual_seed(0)
theirs = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters=rope, tie_word_embeddings=True))
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
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=AdapterParam)


def logits(model, ids):
    """(texts, letters, 128): what may come next."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    mask = jnp.tril(jnp.ones((len(ids), ids.shape[1], ids.shape[1]), bool))
    return model(ids, positions, None, mask)[0]


def cost(model, ids):
    """Of a letter, in nats."""
    scores = logits(model, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, ids):
    """One step on one batch."""
    value, grads = nnx.value_and_grad(cost, argnums=nnx.DiffState(0, AdapterParam))(model, ids)
    optimizer.update(model, grads)
    return value


text = np.array([ord(c) for c in inspect.getsource(qwen3) if c.isascii()], np.int32)  # any text
*read, unseen = np.split(text[: len(text) // 1040 * 1040].reshape(-1, 65), len(text) // 1040)
for i in range(201):
    value = step(model, optimizer, jnp.asarray(read[i % len(read)]))
    if i % 50 == 0:
        print(f"step {i}: a letter costs {value:.3f} nats")
model.save_pretrained(ADAPTER)

theirs = AutoPeftModelForCausalLM.from_pretrained(ADAPTER, dtype=torch.float32).eval()
with torch.no_grad():
    expected = theirs(torch.tensor(unseen).long()).logits.numpy()
apart = abs(np.asarray(logits(model, unseen)) - expected).max() / abs(expected).max()
value = cost(model, jnp.asarray(unseen))
print(f"tunix: unseen letters cost {value:.3f}, logits in PyTorch PEFT within {apart:.1e} of them")
assert apart < 1e-5, "the adapter means something else in PyTorch"
