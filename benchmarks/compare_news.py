"""Ways to fine-tune MiniLM-L6 on the news of Reuters, R8 and R52, for compare.py.

32 documents of 24 tokens a step, AdamW with warm-up and cosine decay; the new head has a learning
rate of its own. LoRA (qwix's) has about as many trained numbers as RandLoRA at r 16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bert
import jax
import jax.numpy as jnp
import qwix
import reuters
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from training import Logits, Settings, accuracy, fit, predict_all
from trials import Method, Result, Trial, tenths

from randlora_jax import RandLoraConfig, get_peft_model

LENGTH, EPOCHS, LORA_RANK = 24, 2.0, 8
Tree = Any


@dataclass(frozen=True)
class Start:
    """Where a run starts: the model as a function, what trains, what does not.

    encoder: where the function wants features in the place of tokens, the model that makes them.
    """

    logits: Logits
    trained: Tree
    frozen: Tree
    encoder: Any = None


def randlora(ratio: float, r: int = 16, **kind: bool) -> Callable[[Any, int], Start]:
    """RandLoRA on every linear layer, and the head trained whole; `ratio` is alpha / r."""

    def start(base: Any, seed: int) -> Start:
        config = RandLoraConfig(
            r=r,
            randlora_alpha=ratio * r,
            task_type="SEQ_CLS",
            projection_prng_key=seed,
            target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",
            modules_to_save=("classifier",),
            **kind,
        )
        model = get_peft_model(base, config)
        return Start(bert.adapted(model), *model.split())

    return start


def lora(scaling: float) -> Callable[[Any, int], Start]:
    """qwix's LoRA on the same layers, and the head trained whole."""

    def start(base: Any, seed: int) -> Start:
        alpha = scaling * LORA_RANK
        provider = qwix.LoraProvider(module_path=".*/encoder/.*", rank=LORA_RANK, alpha=alpha)
        module = qwix.apply_lora_to_model(base.module, provider)

        def apply(params: Tree, fields: Any) -> jax.Array:
            ids = fields["input_ids"]
            places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            given = {**fields, "position_ids": places, "head_mask": None}
            return module.apply({"params": params}, **given).logits

        one = jnp.ones((1, 8), jnp.int32)
        fields = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), one)
        key = jax.random.key(seed)
        made = module.init(key, **fields, position_ids=one, head_mask=None)["params"]
        given = flatten_dict(base.params)
        trained = {path: x for path, x in flatten_dict(made).items() if "lora" in path[-1]}
        trained |= {path: x for path, x in given.items() if path[0] == "classifier"}
        frozen = {path: x for path, x in given.items() if path not in trained}

        def logits(trained: Tree, frozen: Tree, fields: Any) -> jax.Array:
            whole = {**flatten_dict(frozen["base"]), **flatten_dict(trained)}
            return apply(unflatten_dict(whole), fields)

        return Start(logits, unflatten_dict(trained), {"base": unflatten_dict(frozen)})

    return start


def full(base: Any, seed: int) -> Start:
    """Everything."""

    def logits(trained: Tree, _: Tree, fields: Any) -> jax.Array:
        return base(**fields, params=trained).logits

    return Start(logits, base.params, {})


def head(base: Any, seed: int) -> Start:
    """The classifier alone, on what the frozen encoder makes of a document."""
    return Start(bert.head(base.config), base.params["classifier"], {}, base)


HEAD_RATE = 1e-2
METHODS = {
    "RandLoRA, r 16, alpha / r 2": Method(randlora(2), 2e-3, HEAD_RATE),
    "RandLoRA, r 16, alpha / r 6": Method(randlora(6), 1e-3, HEAD_RATE),
    "RandLoRA, r 16, alpha / r 20": Method(randlora(20), 2.5e-4, HEAD_RATE),
    "RandLoRA, r 64, alpha / r 6": Method(randlora(6, 64), 1e-3, HEAD_RATE),
    "RandLoRA, r 16, alpha / r 6, sparse": Method(randlora(6, sparse=True), 1e-3, HEAD_RATE),
    "LoRA (qwix), rank 8, alpha / r 2": Method(lora(2), 2e-3, HEAD_RATE),
    "rsLoRA, rank 8, alpha / sqrt(r) 5.7": Method(lora(2 * LORA_RANK**0.5), 1e-3, HEAD_RATE),
    "head alone": Method(head, 1e-1),
    "everything": Method(full, 1e-4, HEAD_RATE),
}


@dataclass(frozen=True)
class News:
    """Reuters of so many subjects."""

    subjects: int
    methods = METHODS

    @property
    def title(self) -> str:
        """The data set's name."""
        return f"Reuters R{self.subjects}"

    def run(self, method: Method, trial: Trial) -> Result:
        """What a trial reaches; one on held-back documents trains for a quarter as long."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(bert.pretrained())
        known, classes = reuters.load("train", tokenizer, LENGTH, self.subjects)
        train, on = reuters.hold_back(known, share=0.1, seed=0)
        if not trial.held:
            on, _ = reuters.load("test", tokenizer, LENGTH, self.subjects)
        with tempfile.TemporaryDirectory() as folder:
            bert.make_base(Path(folder), classes, trial.seed)
            start: Start = method.start(bert.flax_base(Path(folder)), trial.seed)
        if start.encoder:
            train, on = (bert.features(start.encoder, part, "") for part in (train, on))
        epochs = EPOCHS / 4 if trial.held else EPOCHS
        settings = Settings(trial.rate, trial.head_rate, epochs, seed=trial.seed)
        trained, curve = fit(
            start.logits, start.trained, start.frozen, train, on, settings, "", checks=0
        )
        found = predict_all(jax.jit(start.logits), trained, start.frozen, on)
        size = sum(x.size for x in jax.tree.leaves(start.trained))
        return Result(accuracy(found, on), size, tenths(curve.losses))
