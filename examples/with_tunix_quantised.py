"""QRandLoRA: SmolLM2 in four bits (nf4), tuned in tunix's trainer. Opens in PyTorch PEFT.

python examples/with_tunix_quantised.py    # beside the same run on float32 weights; six minutes
"""

import news
import numpy as np
import qwix
import reuters
import smollm
import tuning
from training import Settings

from randlora_jax import RandLoraConfig, get_peft_model

ADAPTER = "out/examples/tunix_quantised/adapter"
STEPS = 24
config = RandLoraConfig(
    r=32,
    randlora_alpha=640,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    base_model_name_or_path=str(smollm.BASE),
)
smollm.make_base()
tokenizer = smollm.load_tokenizer()
train, held = reuters.hold_back(news.load("train", tokenizer), share=0.1, seed=0)
held = held.take(np.arange(32))

costs, megabytes = {}, {}
for kind in ("float32", "nf4"):
    model = smollm.tunix_base()
    if kind == "nf4":  # tunix's own way to QLoRA; 32 numbers share a scale
        rule = qwix.QuantizationRule(
            module_path=".*(q|k|v|o|gate|up|down)_proj.*", weight_qtype="nf4", tile_size=32
        )
        model = qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())
    model = get_peft_model(model, config)
    megabytes[kind] = model.memory().base / 1e6
    curve = tuning.fit(
        model, train, held, STEPS, Settings(5e-4, 8), tokenizer.pad_token_id, kind, checks=1
    )
    costs[kind] = curve.held_losses[STEPS]

model.save_pretrained(ADAPTER)
print(
    f"QRandLoRA: a held-back answer costs {costs['nf4']:.2f} nats beside nf4 weights "
    f"({megabytes['nf4']:.0f} MB with the embedding), {costs['float32']:.2f} beside float32 ones "
    f"({megabytes['float32']:.0f} MB)"
)

some = held.take(np.arange(8))
beside = smollm.tunix_logits(model, some, tokenizer.pad_token_id, "beside nf4")
merged = model.merge_and_unload(dequantize=True)
whole = smollm.tunix_logits(merged, some, tokenizer.pad_token_id, "merged")
theirs = smollm.peft_model(ADAPTER)
expected = smollm.torch_logits(theirs, some, tokenizer.pad_token_id, "PEFT, true weights")
rounding, apart = (np.abs(x - beside).max() / np.abs(beside).max() for x in (expected, whole))
print(f"dequantised and merged: logits within {apart:.1e} of the largest; in PyTorch PEFT, on the "
      f"weights before they were rounded, within {rounding:.2f}")  # fmt: skip
assert apart < 1e-4, "merging changed what the model computes"
