"""Quality for the price: RandLoRA beside LoRA, the head alone and full fine-tuning.

    make compare      two to three hours on two cores; prints tables, writes out/compare/; goes on
                      where it was stopped

MiniLM-L6 on Reuters R8 and R52, one epoch of 32 documents a step, 24 tokens a document, AdamW with
warm-up and cosine decay. LoRA (qwix's) has about as many trained numbers as RandLoRA. Every method
gets its own learning rate: accuracy on a tenth of the training split, after half an epoch with one
seed, climbed in steps of two until neither neighbour is better. Then three seeds (head, order,
adapter) train for the whole epoch and are tested on the test split. Each core takes a method.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
SUBJECTS, SEEDS, LENGTH = (8, 52), (0, 1, 2), 24
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
        return Start(bert.adapted(model), *model.split())

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
    """The classifier alone, on what the frozen encoder makes of a document."""
    return Start(bert.head(base.config), base.params["classifier"], {}, base)


def _merged(one: Tree, other: Tree) -> Tree:
    return unflatten_dict({**flatten_dict(one), **flatten_dict(other)})


# where the climb for a learning rate begins
METHODS: dict[str, tuple[Callable[[Any, int], Start], float]] = {
    "RandLoRA": (randlora(), 2e-3),
    "RandLoRA, sparse": (randlora(sparse=True), 2e-3),
    "RandLoRA, very sparse": (randlora(very_sparse=True), 2e-3),
    "LoRA (qwix)": (lora, 2e-3),
    "head alone": (head, 1e-1),
    "everything": (full, 2e-4),
}


class Task:
    """One data set, tokenised, and the results of one method on it, kept in a file."""

    def __init__(self, subjects: int, method: str) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(bert.pretrained())
        known, self.classes = reuters.load("train", tokenizer, LENGTH, subjects)
        self.test, _ = reuters.load("test", tokenizer, LENGTH, subjects)
        self.train, self.held = reuters.hold_back(known, share=0.1, seed=0)
        self.title, self.start = f"R{subjects} {method}", METHODS[method][0]
        self.path = OUT / f"{self.title}.json"
        self.found: dict[str, dict[str, float]] = (
            json.loads(self.path.read_text()) if self.path.exists() else {}
        )

    def run(self, rate: float, seed: int, held: bool) -> dict[str, float]:
        """What training at `rate` reaches, on the held-back documents or on the test split."""
        key = f"{rate:g} {'held' if held else f'test, seed {seed}'}"
        if key not in self.found:
            self.found[key] = found = self._run(rate, seed, held)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(f"{self.title}, {key}: {found['accuracy']:.4f}", flush=True)
        return self.found[key]

    def _run(self, rate: float, seed: int, held: bool) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            bert.make_base(Path(folder), self.classes, seed)
            start = self.start(bert.flax_base(Path(folder)), seed)
        train, on = self.train, self.held if held else self.test
        if start.encoder:
            train, on = (bert.features(start.encoder, part, "") for part in (train, on))
        trained, _ = fit(
            start.logits, start.trained, start.frozen, train, on,
            Settings(rate, epochs=0.5 if held else 1.0, seed=seed), "", checks=0,
        )  # fmt: skip
        found = predict_all(jax.jit(start.logits), trained, start.frozen, on)
        size = sum(x.size for x in jax.tree.leaves(start.trained))
        return {"accuracy": accuracy(found, on), "trained": size}

    def best_rate(self, start: float) -> float:
        """A rate whose half and double are no better on the held-back documents."""
        reached = lambda rate: self.run(rate, 0, held=True)["accuracy"]  # noqa: E731
        best = start
        for factor in (2.0, 0.5):
            while reached(best * factor) > reached(best):
                best *= factor
        return best


def outcome(job: tuple[int, str]) -> dict[str, Any]:
    """The row of one method on one data set."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    subjects, method = job
    task = Task(subjects, method)
    rate = task.best_rate(METHODS[method][1])
    tested = [task.run(rate, seed, held=False) for seed in SEEDS]
    found = [one["accuracy"] for one in tested]
    return {
        "rate": rate,
        "mean": statistics.mean(found),
        "spread": statistics.stdev(found),
        "trained": tested[0]["trained"],
    }


def one_core(free: Any) -> None:
    """Keeps this process, and so the threads that XLA makes in it, to a core of its own."""
    os.sched_setaffinity(0, {free.get()})
    # seeds differ in their arrays alone
    jax.config.update("jax_compilation_cache_dir", str(OUT / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


def main() -> None:
    """Every run that is not there yet, then the tables and the picture."""
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [(subjects, method) for subjects in SUBJECTS for method in METHODS]
    spawn = multiprocessing.get_context("spawn")
    free, cores = spawn.Queue(), sorted(os.sched_getaffinity(0))
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(len(cores), spawn, one_core, (free,)) as pool:
        rows = dict(zip(jobs, pool.map(outcome, jobs), strict=True))
    for subjects in SUBJECTS:
        print(f"\nReuters R{subjects}, test accuracy, mean and standard deviation of three seeds\n")
        print("| method | trained numbers | learning rate | accuracy |\n|---|---|---|---|")
        for method in METHODS:
            row = rows[subjects, method]
            print(
                f"| {method} | {row['trained']:,} | {row['rate']:g} "
                f"| {row['mean']:.4f} ± {row['spread']:.4f} |"
            )
    picture(rows)


def picture(rows: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Accuracy over trained numbers."""
    figure, axes = plt.subplots(1, len(SUBJECTS), figsize=(11, 4), layout="constrained")
    for axis, subjects in zip(axes, SUBJECTS, strict=True):
        for method in METHODS:
            row = rows[subjects, method]
            axis.errorbar(row["trained"], row["mean"], row["spread"], marker="o", label=method)
        axis.set(xscale="log", xlabel="trained numbers", ylabel="test accuracy")
        axis.set_title(f"Reuters R{subjects}")
    axes[0].legend()
    figure.savefig(OUT / "compare.png", dpi=120)


if __name__ == "__main__":
    main()
