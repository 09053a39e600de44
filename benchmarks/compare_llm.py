"""Ways to fine-tune SmolLM2 on its demonstration's task in tunix's trainer, for compare.py.

As long as the demonstration trains, searches and tests alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import demo_llm
import jax
import numpy as np
import smollm
import tuning
from flax import nnx
from trials import Method, Result, Trial, tenths

from randlora_jax import get_peft_model

STEPS, HELD, TEST = 48, 256, 400


def randlora(ratio: float, r: int = 32, **kind: bool) -> Callable[[Any, int], Any]:
    """RandLoRA on every linear layer; `ratio` is alpha / r."""

    def start(base: Any, seed: int) -> Any:
        config = dataclasses.replace(
            smollm.CONFIG, r=r, randlora_alpha=ratio * r, projection_prng_key=seed, **kind
        )
        return get_peft_model(base, config)

    return start


def lora(scaling: float) -> Callable[[Any, int], Any]:
    """qwix's LoRA on the same layers."""
    return lambda base, seed: tuning.lora(base, scaling=scaling, seed=seed)


METHODS = {
    "RandLoRA, r 32, alpha / r 2": Method(randlora(2), 2e-3),
    "RandLoRA, r 32, alpha / r 6": Method(randlora(6), 1e-3),
    "RandLoRA, r 32, alpha / r 20": Method(randlora(20), 5e-4),
    "RandLoRA, r 32, alpha / r 6, sparse": Method(randlora(6, sparse=True), 1e-3),
    "LoRA (qwix), rank 6, alpha / r 2": Method(lora(2), 4e-3),
    "rsLoRA, rank 6, alpha / sqrt(r) 4.9": Method(lora(2 * tuning.LORA_RANK**0.5), 1e-3),
    "everything": Method(lambda base, seed: base, 5e-5),
}


@cache
def _task() -> demo_llm.Task:
    smollm.make_base()
    return demo_llm.Task.load(demo_llm.Scale(STEPS, HELD, TEST, prompts=0))


@dataclass(frozen=True)
class Chat:
    """The topic of a news item, asked in the model's chat template."""

    title = "SmolLM2-135M-Instruct, the topic asked in chat"
    methods = METHODS

    def run(self, method: Method, trial: Trial) -> Result:
        """What a trial reaches."""
        task = _task()
        on = task.held.take(np.arange(HELD)) if trial.held else task.test
        model = method.start(smollm.tunix_base(), trial.seed)
        curve = task.fit(model, "", trial.rate, checks=0, seed=trial.seed)
        accuracy = task.accuracy(task.logits(model, "", on), on)
        size = tuning.trained_numbers(model) or _numbers(model)
        return Result(accuracy, size, tenths(curve.losses))


def _numbers(model: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
