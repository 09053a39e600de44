"""RandLoRA on a Hugging Face Flax model, the short of `demo.py`; opened in PyTorch PEFT.

python examples/with_hf_flax.py
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from bert import adapted, flax_base, make_base, peft_model, pretrained, torch_logits
from reuters import hold_back, load
from training import Settings, accuracy, fit, predict_all
from transformers import AutoTokenizer

from randlora_jax import RandLoraConfig, get_peft_model

OUT = Path("out/examples/hf_flax")
tokenizer = AutoTokenizer.from_pretrained(pretrained())
train, classes = load("train", tokenizer, max_length=32)
train, held = hold_back(train, share=0.04, seed=0)
make_base(OUT / "base", classes, seed=0)

config = RandLoraConfig(r=16, randlora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
model = get_peft_model(flax_base(OUT / "base"), config)
model.print_trainable_parameters()
frozen = dict(model.params)
trained = frozen.pop("randlora")
settings = Settings(learning_rate=2e-3, epochs=0.3)
trained, _ = fit(adapted(model), trained, frozen, train, held, settings, "RandLoRA", checks=1)
model.params = {**frozen, "randlora": trained}
model.save_pretrained(OUT / "adapter")

ours = predict_all(adapted(model), trained, frozen, held)
theirs = torch_logits(peft_model(OUT / "base", OUT / "adapter"), held, "PyTorch PEFT")
apart = float(np.abs(ours - theirs).max())
print(
    f"hf_flax: accuracy on {len(held)} held-back documents {accuracy(ours, held):.4f} in JAX, "
    f"{accuracy(theirs, held):.4f} in PyTorch PEFT, logits within {apart:.1e}"
)
if apart > 1e-4:
    raise SystemExit("the adapter means something else in PyTorch")
