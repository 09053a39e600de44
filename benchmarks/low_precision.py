"""How a bfloat16 base model learns, by the ways to apply an adapter and in PEFT: loss curves.

    make low-precision       some five minutes; writes out/low_precision/

MiniLM-L6 on Reuters R8, all linear layers and the head, weights and arithmetic in bfloat16, trained
numbers in float32. Every run starts from the same adapter file, sees the same batches and takes
the same AdamW steps, so the curves differ by arithmetic alone. The rate is small on purpose: what
a step changes is then below the rounding of the weights.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drawings
import jax
import jax.numpy as jnp
import measured
import numpy as np
import optax
import peft
import torch
import transformers
from bert import make_base, pretrained
from reuters import Documents, load
from training import track

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

OUT = Path("out/low_precision")
STEPS, BATCH, LENGTH, RATE = 40, 16, 16, 2e-4
ADAMW = {"eps": 1e-8, "weight_decay": 0.0}
CONFIG = RandLoraConfig(
    r=16,
    randlora_alpha=32,
    task_type="SEQ_CLS",
    target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",
    modules_to_save=("classifier",),
)
# what the layers do with a bfloat16 kernel
WAYS = {
    "bfloat16, beside (the default)": ("auto", jnp.bfloat16),
    "bfloat16, W + delta rounded": ("merged", jnp.bfloat16),
    "bfloat16, factored": ("factored", jnp.bfloat16),
    "float32": ("auto", jnp.float32),
}


def batches(documents: Documents) -> Iterator[Documents]:
    """The same for every run."""
    rows = np.random.default_rng(0).permutation(len(documents))[: STEPS * BATCH]
    for chosen in rows.reshape(STEPS, BATCH):
        yield documents.take(chosen)


def in_jax(base: Path, adapter: Path, documents: Documents, title: str) -> list[float]:
    """The losses of a run in JAX."""
    apply, dtype = WAYS[title]
    kind = transformers.FlaxBertForSequenceClassification
    flax = kind.from_pretrained(base, from_pt=True, dtype=dtype)
    if dtype == jnp.bfloat16:
        flax.params = flax.to_bf16(flax.params)
    model = RandLoraModel.from_pretrained(flax, adapter, is_trainable=True, apply=apply)
    (trained, frozen), tx = model.split(), optax.adamw(RATE, **ADAMW)
    state = tx.init(trained)

    @jax.jit
    def step(trained: Any, state: Any, frozen: Any, fields: Any, labels: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            out = model(**fields, params={**frozen, "randlora": trained}, train=False)
            scores = out.logits.astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    losses = []
    for batch in track(batches(documents), title, STEPS):
        trained, state, value = step(trained, state, frozen, batch.fields, batch.labels)
        losses.append(float(value))
    return losses


def in_peft(base: Path, adapter: Path, documents: Documents) -> list[float]:
    """The losses of the same run in PEFT."""
    kind = transformers.BertForSequenceClassification
    low = kind.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(low, adapter, is_trainable=True).eval()  # no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, **ADAMW)
    losses = []
    for batch in track(batches(documents), "PEFT RandLoRA, bfloat16", STEPS):
        fields = {k: torch.tensor(np.asarray(v)) for k, v in batch.fields.items()}
        scores = model(**fields).logits.float()
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor(batch.labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Trains in every way and draws the curves."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained())
    documents, classes = load("train", tokenizer, LENGTH)
    runs: dict[str, Callable[[], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        make_base(base, classes, seed=0)
        flax = transformers.FlaxBertForSequenceClassification.from_pretrained(base, from_pt=True)
        get_peft_model(flax, CONFIG).save_pretrained(adapter)
        runs["PEFT RandLoRA, bfloat16"] = lambda: in_peft(base, adapter, documents)
        for title in WAYS:
            runs[title] = lambda title=title: in_jax(base, adapter, documents, title)
        curves, seconds = {}, {}
        for title, run in runs.items():
            began = time.perf_counter()
            curves[title] = run()
            seconds[title] = time.perf_counter() - began
            print(f"{title}: {seconds[title]:.0f} s", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    kept = OUT / "low-precision.json"
    measured.keep(kept, "make low-precision", curves)
    measured.draw(drawings.low_precision, kept, OUT / "low-precision.png")
    exact = np.array(curves["float32"])
    print(
        "| run | loss, last ten steps | distance from float32, mean | seconds |\n|---|---|---|---|"
    )
    for title, losses in curves.items():
        apart = float(np.abs(np.array(losses) - exact).mean())
        print(f"| {title} | {np.mean(losses[-10:]):.4f} | {apart:.4f} | {seconds[title]:.0f} |")


if __name__ == "__main__":
    main()
