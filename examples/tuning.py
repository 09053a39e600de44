"""A model trained on the news by tunix's own trainer, whatever of it is trained."""

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from reuters import Documents
from smollm import model_input
from training import Settings, track
from tunix.sft import hooks, peft_trainer

LORA_RANK = 6


@dataclass
class Curve(hooks.TrainingHooks):
    """What a run looked like: a loss for each step, and now and then one on held-back documents.

    The trainer tells it, as its hooks.
    """

    losses: list[float] = field(default_factory=list)
    held_losses: dict[int, float] = field(default_factory=dict)
    batches: int = 0  # of held-back documents
    times: list[float] = field(default_factory=list)

    def on_train_start(self, trainer: Any) -> None:
        """Nothing to note."""

    def on_train_end(self, trainer: Any) -> None:
        """Nothing to note."""

    def on_train_step_start(self, trainer: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def on_train_step_end(self, trainer: Any, step: int, loss: float) -> None:
        """Notes the loss."""
        self.losses.append(float(loss))

    def on_eval_step_start(self, trainer: Any) -> None:
        """Counts the batches."""
        self.batches += 1

    @property
    def seconds_per_step(self) -> float:
        """From step to step, where no held-back documents are looked at."""
        return float(np.median(np.diff(self.times)))

    def on_eval_step_end(self, trainer: Any, loss: float) -> None:
        """Notes the mean loss of the held-back documents."""
        self.held_losses[trainer.train_steps] = float(loss) / self.batches
        self.batches = 0


def lora(base: Any, rank: int = LORA_RANK, scaling: float = 2.0, seed: int = 0) -> Any:
    """The base model with qwix's LoRA around the same layers, as tunix's users do it."""
    kinds = ".*(q|k|v|o|gate|up|down)_proj"
    provider = qwix.LoraProvider(module_path=kinds, rank=rank, alpha=scaling * rank)
    return qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(seed))


def lora_deltas(model: Any) -> dict[str, np.ndarray]:
    """What LoRA adds to each kernel, as a matrix: its two factors multiplied, twice (alpha)."""
    factors = {
        "/".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.iter_graph(model)
        if isinstance(leaf, nnx.LoRAParam)
    }
    return {
        name.removesuffix("_lora_a"): 2.0
        * a.reshape(-1, a.shape[-1])
        @ (b := factors[name[:-1] + "b"]).reshape(b.shape[0], -1)
        for name, a in factors.items()
        if name.endswith("_lora_a")
    }


def trained_numbers(model: Any) -> int:
    """How many numbers the trainer changes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Adam behind clipping: linear warm-up, cosine decay."""
    warmup = max(1, round(settings.warmup_share * steps))
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate))


def fit(
    model: Any,
    train: Documents,
    held: Documents,
    steps: int,
    settings: Settings,
    pad: int,
    title: str,
    checks: int = 5,
) -> Curve:
    """Trains the model's LoRAParams, or all of it where there are none, on answers alone."""

    def inputs(documents: Documents) -> peft_trainer.TrainingInput:
        fields = documents.fields
        return peft_trainer.TrainingInput(fields["answered"], fields["graded"])

    def arguments(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
        return {**model_input(batch.input_tokens, pad), "input_mask": batch.input_mask}

    order = np.random.default_rng(settings.seed).permutation(len(train))
    rows = np.resize(order, (steps, settings.batch_size))
    curve = Curve()
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=max(1, steps // max(1, checks)),
        max_inflight_computations=1,  # so that the times of steps can be told apart
    )
    trainer = peft_trainer.PeftTrainer(model, optimizer(settings, steps), config)
    trainer = trainer.with_gen_model_input_fn(arguments)
    trainer.with_training_hooks(curve)
    batches = (inputs(train.take(chosen)) for chosen in rows)
    checked = [inputs(batch) for batch in held.batches(settings.batch_size)] if checks else None
    shown = track(batches, title, steps)
    first = next(shown)  # or the bar would appear only once the held-back documents are judged
    trainer.train(itertools.chain([first], shown), checked)
    return curve
