"""Quality for the price: RandLoRA beside LoRA, the head alone and full fine-tuning.

    make compare      some hours; prints tables, writes out/compare/; goes on where it was stopped

MiniLM-L6 on Reuters R8 and R52, one epoch of 32 documents a step, 32 tokens a document, AdamW with
warm-up and cosine decay. LoRA (qwix's) has about as many trained numbers as RandLoRA. Every method
gets its learning rate from its own list, by accuracy on a tenth of the training split, with one
seed; then three seeds (head, order, adapter) train on the rest and are tested on the test split.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import bert
import jax
import jax.numpy as jnp
import matplotlib
import qwix
import reuters
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from training import Logits, Settings, accuracy, fit, predict_all

from randlora_jax import RandLoraConfig, get_peft_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path("out/compare")
SUBJECTS, SEEDS, LENGTH = (8, 52), (0, 1, 2), 32
Tree = Any


@dataclass(frozen=True)
class Start:
    """Where a run starts: the model as a function, what trains, what does not."""

    logits: Logits
    trained: Tree
    frozen: Tree


def randlora(**kind: bool) -> Callable[[Any, int], Start]:
    """RandLoRA on every linear layer, and the head trained whole."""

    def start(base: Any, seed: int) -> Start:
        config = RandLoraConfig(
            r=16,
            randlora_alpha=32,
            task_type="SEQ_CLS",
            projection_prng_key=seed,
            target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",
            modules_to_save=("classifier",),
            **kind,
        )
        model = get_peft_model(base, config)
        frozen = dict(model.params)
        return Start(bert.adapted(model), frozen.pop("randlora"), frozen)

    return start


def lora(base: Any, seed: int) -> Start:
    """qwix's LoRA on the same layers, and the head trained whole."""
    provider = qwix.LoraProvider(module_path=".*/encoder/.*", rank=8, alpha=16.0)
    module = qwix.apply_lora_to_model(base.module, provider)

    def apply(params: Tree, fields: Any) -> jax.Array:
        ids = fields["input_ids"]
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return module.apply(
            {"params": params}, **fields, position_ids=places, head_mask=None
        ).logits

    one = jnp.ones((1, 8), jnp.int32)
    fields = {"input_ids": one, "attention_mask": one, "token_type_ids": one}
    made = module.init(jax.random.key(seed), **fields, position_ids=one, head_mask=None)["params"]
    flat, given = flatten_dict(made), flatten_dict(base.params)
    trained = {path: x for path, x in flat.items() if "lora" in path[-1]}
    trained |= {path: x for path, x in given.items() if path[0] == "classifier"}
    frozen = {path: x for path, x in given.items() if path not in trained}

    def logits(trained: Tree, frozen: Tree, fields: Any) -> jax.Array:
        return apply(_merged(unflatten_dict(frozen["base"]), trained), fields)

    return Start(logits, unflatten_dict(trained), {"base": frozen})


def full(base: Any, seed: int) -> Start:
    """Everything."""

    def logits(trained: Tree, _: Tree, fields: Any) -> jax.Array:
        return base(**fields, params=trained).logits

    return Start(logits, base.params, {})


def head(base: Any, seed: int) -> Start:
    """The classifier alone."""

    def logits(trained: Tree, frozen: Tree, fields: Any) -> jax.Array:
        return base(**fields, params={**frozen, "classifier": trained}).logits

    frozen = dict(base.params)
    return Start(logits, frozen.pop("classifier"), frozen)


def _merged(one: Tree, other: Tree) -> Tree:
    return unflatten_dict({**flatten_dict(one), **flatten_dict(other)})


METHODS: dict[str, tuple[Callable[[Any, int], Start], tuple[float, ...]]] = {
    "RandLoRA": (randlora(), (1e-3, 2e-3, 4e-3)),
    "RandLoRA, sparse": (randlora(sparse=True), (1e-3, 2e-3, 4e-3)),
    "RandLoRA, very sparse": (randlora(very_sparse=True), (1e-3, 2e-3, 4e-3)),
    "LoRA (qwix)": (lora, (1e-3, 2e-3, 4e-3)),
    "head alone": (head, (1e-2, 1e-1, 3e-1)),
    "everything": (full, (1e-4, 2e-4, 4e-4)),
}


class Results:
    """Accuracies by run, kept in a file from which a stopped comparison goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, float]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )

    def of(self, key: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The result stored under `key`, or that of `run`."""
        if key not in self.found:
            self.found[key] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        return self.found[key]


def main() -> None:
    """Every run that is not there yet, then the tables and the picture."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = Results(OUT / "runs.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert.pretrained())
    table: dict[int, dict[str, dict[str, Any]]] = {}
    for subjects in SUBJECTS:
        known, classes = reuters.load("train", tokenizer, LENGTH, subjects)
        test, _ = reuters.load("test", tokenizer, LENGTH, subjects)
        train, held = reuters.hold_back(known, share=0.1, seed=0)

        def run(
            method: str, rate: float, seed: int, on: Any, train=train, classes=classes
        ) -> dict[str, float]:
            with tempfile.TemporaryDirectory() as folder:
                bert.make_base(Path(folder), classes, seed)
                start = METHODS[method][0](bert.flax_base(Path(folder)), seed)
            title = f"{method}, {rate:g}, seed {seed}"
            trained, curve = fit(
                start.logits, start.trained, start.frozen, train, on,
                Settings(learning_rate=rate, seed=seed), title, checks=1,
            )  # fmt: skip
            found = predict_all(jax.jit(start.logits), trained, start.frozen, on)
            return {
                "accuracy": accuracy(found, on),
                "seconds_per_step": curve.seconds_per_step,
                "trained": sum(x.size for x in jax.tree.leaves(start.trained)),
            }

        rows = table[subjects] = {}
        for method, (_, rates) in METHODS.items():
            chosen = max(
                rates,
                key=lambda rate: results.of(
                    f"R{subjects} {method} {rate:g} held",
                    lambda: run(method, rate, 0, held),  # noqa: B023
                )["accuracy"],
            )
            tested = [
                results.of(
                    f"R{subjects} {method} {chosen:g} seed {seed}",
                    lambda: run(method, chosen, seed, test),  # noqa: B023
                )
                for seed in SEEDS
            ]
            found = [one["accuracy"] for one in tested]
            rows[method] = {
                "rate": chosen,
                "mean": statistics.mean(found),
                "spread": statistics.stdev(found),
                "trained": tested[0]["trained"],
                "seconds": statistics.median(one["seconds_per_step"] for one in tested),
            }
    for subjects, rows in table.items():
        print(f"\nReuters R{subjects}, test accuracy, mean and standard deviation of three seeds\n")
        print("| method | trained numbers | learning rate | accuracy | seconds a step |")
        print("|---|---|---|---|---|")
        for method, row in rows.items():
            print(
                f"| {method} | {row['trained']:,} | {row['rate']:g} "
                f"| {row['mean']:.4f} ± {row['spread']:.4f} | {row['seconds']:.2f} |"
            )
    picture(table)


def picture(table: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Accuracy over trained numbers."""
    figure, axes = plt.subplots(1, len(table), figsize=(11, 4), layout="constrained")
    for axis, (subjects, rows) in zip(axes, table.items(), strict=True):
        for method, row in rows.items():
            axis.errorbar(row["trained"], row["mean"], row["spread"], marker="o", label=method)
        axis.set(xscale="log", xlabel="trained numbers", ylabel="test accuracy")
        axis.set_title(f"Reuters R{subjects}")
    axes[0].legend()
    figure.savefig(OUT / "compare.png", dpi=120)


if __name__ == "__main__":
    main()
