"""A language model tuned by tunix's trainer with RandLoRA, and what PyTorch PEFT makes of it.

    python examples/demo_llm.py            # what `make demo-llm` runs; writes out/demo-llm/
    python examples/demo_llm.py --short    # a few steps and prompts, as the tests run it
    python examples/demo_llm.py --full     # full fine-tuning, for the table; half an hour more

Some of the training documents are held back: settings are compared on them, the curves are drawn
on them, and nothing is trained on them. The test documents give the numbers at the end, no more.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import measured
import news
import numpy as np
import pictures
import report_llm
import reuters
import smollm
import speaking
import style
import tuning
from directories import saved_bytes, weight_bytes
from reuters import Documents
from rich.console import Console
from training import Settings, accuracy, run_all
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from randlora_jax import get_peft_model
from randlora_jax.commands.main import main as command

SHORT = "--short" in sys.argv
OUT = Path("out/demo-llm-short" if SHORT else "out/demo-llm")
ADAPTER = OUT / "adapter"

# Found on the held-back documents by `python benchmarks/compare.py chat`.
RATES = {"RandLoRA": 5e-4, "LoRA": 4e-3, "full fine-tuning": 1e-4}


@dataclass(frozen=True)
class Scale:
    """How much is done: training steps, documents held back, tested, and prompts continued."""

    steps: int
    held: int
    test: int
    prompts: int


FEW = 16 if SHORT else 64  # test documents for what is only to be the same model
SCALE = Scale(4, 8, 16, 2) if SHORT else Scale(steps=48, held=32, test=400, prompts=50)

console = Console()


@dataclass(frozen=True)
class Task:
    """The documents, and how a model is trained on them and judged by them."""

    tokenizer: Any
    train: Documents
    held: Documents
    test: Documents
    scale: Scale

    @classmethod
    def load(cls, scale: Scale) -> "Task":
        """The held-back and test documents are chosen at random, always the same."""
        tokenizer = smollm.load_tokenizer()
        known, test = (news.load(split, tokenizer) for split in ("train", "test"))
        train, held = reuters.hold_back(known, share=0.1, seed=0)
        chosen = np.random.default_rng(0).permutation(len(test))[: scale.test]
        return cls(tokenizer, train, held, test.take(chosen), scale)

    def fit(
        self, model: Any, name: str, rate: float, checks: int = 4, seed: int = 0
    ) -> tuning.Curve:
        """Trains a tunix model."""
        settings, pad = Settings(rate, batch_size=8, seed=seed), self.tokenizer.pad_token_id
        held = self.held.take(np.arange(self.scale.held))
        return tuning.fit(model, self.train, held, self.scale.steps, settings, pad, name, checks)

    def logits(self, model: Any, name: str, documents: Documents | None = None) -> np.ndarray:
        """What a tunix model says may follow each prompt (of the test documents)."""
        pad, asked = self.tokenizer.pad_token_id, documents or self.test
        return smollm.tunix_logits(model, asked, pad, f"{name}, prompts")

    def torch_logits(self, model: Any, name: str, count: int | None = None) -> np.ndarray:
        """The same of a PyTorch model, for the first `count` test documents."""
        some = self.test.take(np.arange(count or len(self.test)))
        return smollm.torch_logits(model, some, self.tokenizer.pad_token_id, f"{name}, prompts")

    def topics(self, logits: np.ndarray) -> np.ndarray:
        """Scores of the eight topics: those of the tokens that their answers begin with."""
        return logits[:, news.first_tokens(self.tokenizer)]

    def accuracy(self, logits: np.ndarray, documents: Documents | None = None) -> float:
        """Share of documents (of the test documents) whose topic scores best."""
        return accuracy(self.topics(logits), documents or self.test)

    def disagreements(self, ours: np.ndarray, theirs: np.ndarray) -> int:
        """How many of `theirs` choose another topic than `ours` does."""
        mine, other = (self.topics(logits).argmax(-1) for logits in (ours, theirs))
        return int((mine[: len(other)] != other).sum())


def main() -> None:
    """The whole job, in order."""
    began = time.perf_counter()
    jax.config.update("jax_default_matmul_precision", "highest")
    transformers_logging.set_verbosity_error()

    console.rule("1. A pretrained language model and labelled text")
    _, task, base = run_all(
        "converting, loading",
        smollm.make_base,
        lambda: Task.load(SCALE),
        smollm.tunix_base,
    )
    print(f"{len(task.train)} documents to train on, {len(task.test)} to test\n")
    print(speaking.prompts(task.tokenizer, 1)[0], end="\n\n")
    if "--full" in sys.argv:
        return full(task, base)
    shutil.rmtree(ADAPTER, ignore_errors=True)
    OUT.mkdir(parents=True, exist_ok=True)

    model, ours, curve, results = with_randlora(task, base)
    if not SHORT:
        results |= beside_lora(task, model, curve, results["test_accuracy"])
    results |= in_pytorch(task, model, ours)
    if (OUT / "full.json").exists():
        results["full_fine_tuning"] = json.loads((OUT / "full.json").read_text())
    results["total_seconds"] = time.perf_counter() - began
    (OUT / "report.json").write_text(json.dumps(results, indent=2) + "\n")

    console.rule("5. In short")
    report_llm.print_results(console, results)
    for path in sorted(OUT.iterdir()):
        print(path)


def with_randlora(task: Task, base: Any) -> tuple[Any, np.ndarray, tuning.Curve, dict[str, Any]]:
    """The model as it is, then trained: the wrapped model, its logits, its curve, the figures."""
    untouched = task.logits(base, "untouched model")
    theirs = AutoModelForCausalLM.from_pretrained(smollm.BASE)
    apart = difference(untouched, task.torch_logits(theirs, "the same in PyTorch", FEW))

    console.rule("2. RandLoRA around every linear layer, trained by tunix's PeftTrainer")
    model: Any = get_peft_model(base, smollm.CONFIG)
    model.print_trainable_parameters()
    curve = task.fit(model, "RandLoRA", RATES["RandLoRA"], checks=0 if SHORT else 4)
    ours = task.logits(model, "RandLoRA")
    model.save_pretrained(ADAPTER)
    found = {
        "trainable_parameters": tuning.trained_numbers(model),
        "test_documents": len(task.test),
        "test_accuracy": task.accuracy(ours),
        "untouched_test_accuracy": task.accuracy(untouched),
        "untouched_logit_difference": apart,
        "largest_logit": float(np.abs(ours).max()),
        "moved_by": float(np.abs(ours - untouched).mean() / untouched.std()),
        "seconds_per_step": curve.seconds_per_step,
        "losses": curve.losses,
        "held_back_losses": curve.held_losses,
    }
    return model, ours, curve, found


def beside_lora(task: Task, randlora: Any, curve: tuning.Curve, accuracy: float) -> dict[str, Any]:
    """LoRA trained likewise, and both drawn."""
    console.rule("3. LoRA (qwix) with as many trained numbers, in the same trainer")
    (lora,) = run_all("LoRA, wrapping", lambda: tuning.lora(smollm.tunix_base()))
    lora_curve = task.fit(lora, "LoRA", RATES["LoRA"])
    found = task.accuracy(task.logits(lora, "LoRA"))
    runs = {
        f"RandLoRA: {accuracy:.4f} of the test documents": curve,
        f"LoRA: {found:.4f}": lora_curve,
    }
    style.picture(pictures.curves, OUT / "curves.png", runs)
    deltas, lora_deltas = run_all(
        "changes", randlora.delta_weights, lambda: tuning.lora_deltas(lora)
    )
    changed = pictures.changed(deltas, lora_deltas)
    measured.keep(OUT / "demo-llm.json", "make demo-llm", changed)
    measured.draw(pictures.changes, OUT / "demo-llm.json", OUT / "changes.png")
    above = {
        name: sum(value >= 0.01 for value in values) for name, values in changed["spectra"].items()
    }
    return {
        "lora_trainable_parameters": tuning.trained_numbers(lora),
        "lora_test_accuracy": found,
        "lora_seconds_per_step": lora_curve.seconds_per_step,
        "lora_losses": lora_curve.losses,
        "lora_held_back_losses": lora_curve.held_losses,
        "singular_values_above_a_hundredth": above,
    }


def in_pytorch(task: Task, model: Any, ours: np.ndarray) -> dict[str, Any]:
    """The adapter, and what `randlora-jax merge` and `to-lora` make of it, in PyTorch."""
    console.rule("4. The same adapter in PyTorch PEFT: logits, and the words it says")
    prompts = speaking.prompts(task.tokenizer, task.scale.prompts)
    said = speaking.in_tunix(model, task.tokenizer, prompts, "tunix's sampler")
    options = ["--base", str(smollm.BASE), "--force"]
    for line in (
        ()
        if SHORT
        else (
            ["merge", str(ADAPTER), str(OUT / "merged"), *options],
            ["to-lora", str(ADAPTER), str(OUT / "lora"), "--rank", "64", *options],
        )
    ):
        print("randlora-jax", *line)
        with redirect_stdout(StringIO()) as lines:  # a line for each layer
            status = command(line)
        if status:
            raise SystemExit(f"exit status {status}")
        print(lines.getvalue().splitlines()[-1])
    openers = {
        "PEFT": lambda: smollm.peft_model(ADAPTER),
        "merged": lambda: AutoModelForCausalLM.from_pretrained(OUT / "merged").eval(),
        "to-lora, rank 64": lambda: smollm.peft_model(OUT / "lora"),
    }
    openers = {"PEFT": openers["PEFT"]} if SHORT else openers
    found: dict[str, Any] = {"adapter_bytes": weight_bytes(ADAPTER), "in_pytorch": {}}
    words = {"tunix": said}
    for name, opened in openers.items():
        (theirs,) = run_all(f"{name}, opening", opened)
        if name == "PEFT" and not SHORT:
            save = partial(saved_bytes, theirs)
            (found["peft_adapter_bytes"],) = run_all("PEFT's own save", save)
        logits = task.torch_logits(theirs, name, None if name == "PEFT" else FEW)
        words[name] = speaking.in_torch(theirs, task.tokenizer, prompts, f"{name}, words")
        same = sum(a == b for a, b in zip(said, words[name], strict=True))
        found["in_pytorch"][name] = {
            "test_documents": len(logits),
            "other_topics": task.disagreements(ours, logits),
            "logit_difference": difference(ours, logits),
            "same_words": same,
        }
    report_llm.print_words(console, words)
    asked = [text.split("user\n")[-1].split(smollm.END)[0] for text in prompts]
    return found | {"prompts": len(prompts), "words": {"asked": asked, **words}}


def full(task: Task, base: Any) -> None:
    """Full fine-tuning in the same trainer, kept for the table."""
    curve = task.fit(base, "full fine-tuning", RATES["full fine-tuning"])
    logits = task.logits(base, "full fine-tuning")
    found: Mapping[str, Any] = {
        "test_accuracy": task.accuracy(logits),
        "seconds_per_step": curve.seconds_per_step,
        "losses": curve.losses,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "full.json").write_text(json.dumps(found, indent=2) + "\n")
    print({name: value for name, value in found.items() if name != "losses"})


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest between two sets of logits, as far as the second goes."""
    return float(np.abs(ours[: len(theirs)] - theirs).max())


if __name__ == "__main__":
    main()
