"""QRandLoRA in google-tunix's PeftTrainer: SmolLM2 in nf4 beside float32. Opens in PyTorch PEFT.

python examples/with_tunix_quantised.py
"""

import time

import news
import numpy as np
import optax
import qwix
import smollm
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

ADAPTER = "out/examples/tunix_quantised/adapter"
STEPS, BATCH = 24, 4

smollm.make_base()
tokenizer = smollm.load_tokenizer()
pad = tokenizer.pad_token_id
read, unseen = news.load("train", tokenizer), news.load("test", tokenizer)
unseen = unseen.take(np.arange(16))
chosen = np.random.default_rng(0).permutation(len(read))[: STEPS * BATCH].reshape(STEPS, BATCH)
batches = [  # the loss is that of the answers alone
    TrainingInput(some.fields["answered"], some.fields["graded"]) for some in map(read.take, chosen)
]
config = RandLoraConfig(
    r=32,
    randlora_alpha=640,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    base_model_name_or_path=str(smollm.BASE),
)


def quantised(model):
    """The model with its linear layers in nf4, a scale for every 32 numbers: tunix's recipe.

    Not ".*", which takes in the output head too: that is the embedding, held in float32 for the
    other end of the model, and so would be rounded anew in every step.
    """
    rule = qwix.QuantizationRule(module_path=".*_proj", weight_qtype="nf4", tile_size=32)
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), **model.get_model_input())


def model_inputs(batch):
    """What the trainer's loss calls the model with."""
    return {**smollm.model_input(batch.input_tokens, pad), "input_mask": batch.input_mask}


def trained(base):
    """The model with an adapter that was trained, and what came of it."""
    model = get_peft_model(base, config)
    training = TrainingConfig(eval_every_n_steps=STEPS, max_inflight_computations=1)
    trainer = PeftTrainer(model, optax.adam(5e-4), training).with_gen_model_input_fn(model_inputs)
    step = nnx.jit(trainer.create_train_step_fn(), donate_argnames="optimizer")
    planned = step.lower(model, trainer.optimizer, batches[0]).compile().compiled.memory_analysis()
    began = time.perf_counter()
    trainer.train(batches)
    seconds = time.perf_counter() - began
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    memory = model.memory()
    return model, {
        "base model, MiB": memory.base / 2**20,
        "bases and adapter, MiB": (memory.bases + memory.adapters) / 2**20,
        "gradients and Adam's moments, MiB": (memory.gradients + memory.adamw) / 2**20,
        "a step's temporaries, by XLA, MiB": planned.temp_size_in_bytes / 2**20,
        "loss of the first step": losses[0],
        "loss of the last ten steps, mean": np.mean(losses[-10:]),
        f"{STEPS} steps, seconds": seconds,
    }


beside = trained(smollm.tunix_base())[1]
model, found = trained(quantised(smollm.tunix_base()))
print(f"{'':<36}{'float32':>10}{'nf4':>10}")
for name, value in found.items():
    print(f"{name:<36}{beside[name]:>10,.2f}{value:>10,.2f}")

model.save_pretrained(ADAPTER)
expected = smollm.torch_logits(smollm.peft_model(ADAPTER), unseen, pad, "")
there = RandLoraModel.from_pretrained(smollm.tunix_base(), ADAPTER)
in_float, in_nf4 = (smollm.tunix_logits(m, unseen, pad, "") for m in (there, model))
exact, rounded = (abs(x - expected).max() / abs(expected).max() for x in (in_float, in_nf4))
print(f"logits in PyTorch PEFT, on the float32 model: within {exact:.1e} of the same in JAX, and "
      f"{rounded:.1e} from the nf4 model, beside whose rounded weights it was trained")  # fmt: skip
assert exact < 1e-5, "the adapter means something else in PyTorch"
