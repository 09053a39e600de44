"""The main job on real input: fine-tune BERT with RandLoRA in JAX, open the adapter in PyTorch.

    python examples/demo.py            # what `make demo` runs; writes out/demo/
    python examples/demo.py --select   # how the settings below were chosen

A tenth of the training documents is held back: the settings were chosen on it, the curves are
drawn on it, and nothing is trained on it. The test split gives the numbers at the end, no more.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import bert
import jax
import measured
import numpy as np
import plots
import report
import reuters
import style
from directories import saved_bytes, weight_bytes
from rich.console import Console
from training import Settings, accuracy, fit, predict_all, run_all
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

OUT = Path("out/demo")
BASE, ADAPTER = OUT / "base", OUT / "adapter"
MAX_LENGTH = 64

CONFIG = RandLoraConfig(
    base_model_name_or_path=str(BASE),
    task_type="SEQ_CLS",
    r=16,
    randlora_alpha=32,
    projection_prng_key=0,
    target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",  # every linear layer
    modules_to_save=("classifier",),  # the new head is trained whole
)

# Chosen on the held-back documents by choose.py: for both from the same rates; and, because the
# head alone likes far larger ones, a second time for it from those.
RANDLORA_SETTINGS = Settings(learning_rate=2e-3)
HEAD_SETTINGS = Settings(learning_rate=1e-2)
HEAD_BEST_SETTINGS = Settings(learning_rate=3e-1)

console = Console()


def main() -> None:
    """The whole job, in order."""
    began = time.perf_counter()
    jax.config.update("jax_default_matmul_precision", "highest")
    transformers_logging.set_verbosity_error()  # it would warn that the head is new: it is
    transformers_logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)

    console.rule("1. A pretrained model and labelled text")
    tokenizer = AutoTokenizer.from_pretrained(bert.pretrained())
    known, classes = reuters.load("train", tokenizer, MAX_LENGTH)
    test, _ = reuters.load("test", tokenizer, MAX_LENGTH)
    train, held = reuters.hold_back(known, share=0.1, seed=0)
    _, base = run_all(
        "loading the model",
        lambda: bert.make_base(BASE, classes, seed=0),
        lambda: bert.flax_base(BASE),
    )
    print(f"{len(train)} documents to train on, {len(held)} held back, {len(test)} to test")
    print(f"classes: {', '.join(classes)}")
    if "--select" in sys.argv[1:]:
        import choose

        return choose.main(base, CONFIG, train, held)

    console.rule("2. RandLoRA around every linear layer of the encoder")
    model: Any = get_peft_model(base, CONFIG)
    report.print_trained(console, model)
    model.print_trainable_parameters()

    console.rule("3. Training: the head alone on frozen features, then RandLoRA")
    head, fresh_head = bert.head(base.config), base.params["classifier"]
    train_features = bert.features(base, train, "features to train on")
    held_features = bert.features(base, held, "features, held back")
    trained_head, head_curve = fit(
        head, fresh_head, {}, train_features, held_features, HEAD_SETTINGS, "head alone"
    )
    best_head, best_head_curve = fit(
        head, fresh_head, {}, train_features, held_features, HEAD_BEST_SETTINGS, "head, best rate"
    )

    logits = bert.adapted(model)
    trained, frozen = model.split()
    trained, curve = fit(logits, trained, frozen, train, held, RANDLORA_SETTINGS, "RandLoRA")
    model.params = {**frozen, "randlora": trained}

    console.rule("4. The test split in JAX")
    test_features = bert.features(base, test, "features, test split")
    head_logits = predict_all(head, trained_head, {}, test_features)
    best_head_logits = predict_all(head, best_head, {}, test_features)
    predict = jax.jit(logits)
    ours = predict_all(predict, trained, frozen, test, "RandLoRA, test split")

    console.rule("5. The same adapter in PyTorch PEFT")
    model.save_pretrained(ADAPTER)
    peft_model = bert.peft_model(BASE, ADAPTER)
    peft_bytes = saved_bytes(peft_model)
    theirs = bert.torch_logits(peft_model, test, "PyTorch PEFT, test split")

    console.rule("6. The directory back in a fresh Flax model")
    again: Any = RandLoraModel.from_pretrained(bert.flax_base(BASE), ADAPTER)
    trained, frozen = again.split()
    some = test.take(np.arange(512))
    reloaded = predict_all(jax.jit(bert.adapted(again)), trained, frozen, some, "reloaded")
    reload_difference = float(np.abs(reloaded - ours[: len(some)]).max())
    print(f"largest logit difference over {len(some)} documents: {reload_difference:.1e}")

    console.rule("7. Pictures and report")
    results = {
        "max_length": MAX_LENGTH,
        "test_accuracy": accuracy(ours, test),
        "head_only_accuracy": accuracy(head_logits, test),
        "head_only_accuracy_at_its_best_rate": accuracy(best_head_logits, test),
        "held_back_accuracy": curve.accuracies[-1],
        "head_only_held_back_accuracy": head_curve.accuracies[-1],
        "peft_test_accuracy": accuracy(theirs, test),
        "disagreeing_documents": int((ours.argmax(-1) != theirs.argmax(-1)).sum()),
        "max_abs_logit_difference": float(np.abs(ours - theirs).max()),
        "reload_max_abs_logit_difference": reload_difference,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "adapter_bytes": weight_bytes(ADAPTER),
        "peft_adapter_bytes": peft_bytes,
        "seconds_per_step": curve.seconds_per_step,
        "train_seconds": curve.seconds,
        "total_seconds": time.perf_counter() - began,
    }
    (OUT / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    runs = {
        name: {
            "losses": measured.rounded(run.losses),
            "checked_at": run.checked_at,
            "accuracies": measured.rounded(run.accuracies),
            "test_accuracy": results[accuracy_of],
        }
        for name, run, accuracy_of in (
            ("RandLoRA", curve, "test_accuracy"),
            ("head alone, its best rate", best_head_curve, "head_only_accuracy_at_its_best_rate"),
            ("head alone, same rates", head_curve, "head_only_accuracy"),
        )
    }
    kept = OUT / "demo-curves.json"
    measured.keep(kept, "make demo", runs)
    measured.draw(plots.curves, kept, OUT / "curves.png")
    style.picture(plots.changes, OUT / "changes.png", model.delta_weights(), bert.KINDS)
    for name in ("curves.png", "changes.png", "report.json", kept.name, "adapter/"):
        print(OUT / name)

    console.rule("8. In short")
    report.print_results(console, results)


if __name__ == "__main__":
    main()
