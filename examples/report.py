"""The tables that the demo prints."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bert import KINDS
from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table
from tables import print_rows

THREE_LINES = """\
model = get_peft_model(model, RandLoraConfig(r=16, randlora_alpha=32, target_modules="all-linear"))
trained, frozen = model.split()  # train `trained` with optax
model.params = {**frozen, "randlora": trained}; model.save_pretrained("adapter")"""


def print_trained(console: Console, model: Any) -> None:
    """What is trained and what is frozen, for each kind of layer."""
    trained = count(model.params["randlora"]["default"])
    frozen = count(model.params["params"])
    table = Table("kind of layer", title="What is trained, what is frozen")
    for column in ("frozen", "trained", "trained share"):
        table.add_column(column, justify="right")
    for kind in (*KINDS.values(), "classifier", "everything else", "total"):
        new, old = trained[kind], frozen[kind]
        table.add_row(kind, f"{old:,}", f"{new:,}", f"{new / (new + old):.1%}")
    console.print(table)


def count(tree: Any) -> Counter[str]:
    """How many numbers each kind of layer holds."""
    counts: Counter[str] = Counter()
    for path, leaf in flatten_dict(tree, sep=".").items():
        layer = re.sub(r"^bert\.encoder\.layer\.\d+\.", "", path.rpartition(".")[0])
        kind = "classifier" if layer == "classifier" else KINDS.get(layer, "everything else")
        counts[kind] += leaf.size
        counts["total"] += leaf.size
    return counts


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The figures that matter, and how to do the same with another model."""
    ours, theirs = results["adapter_bytes"], results["peft_adapter_bytes"]
    rows = {
        "test accuracy, RandLoRA in JAX": f"{results['test_accuracy']:.4f}",
        "test accuracy, same adapter in PyTorch PEFT": f"{results['peft_test_accuracy']:.4f}",
        "test accuracy, head alone, same rates": f"{results['head_only_accuracy']:.4f}",
        "test accuracy, head alone, its best rate": (
            f"{results['head_only_accuracy_at_its_best_rate']:.4f}"
        ),
        "documents on which JAX and PEFT disagree": f"{results['disagreeing_documents']}",
        "largest logit difference, JAX and PEFT": f"{results['max_abs_logit_difference']:.1e}",
        "trained numbers": f"{results['trainable_parameters']:,}",
        "adapter on disk": f"{ours / 1e6:.1f} MB",
        "the same, saved by PEFT": f"{theirs / 1e6:.1f} MB, {theirs / ours:.0f} times as much",
        "training": f"{results['train_seconds']:.0f} s, {results['seconds_per_step']:.2f} s a step",
        "everything": f"{results['total_seconds']:.0f} s",
    }
    print_rows(console, rows)
    console.print("\nThe same with your own Hugging Face Flax model:\n")
    console.print(THREE_LINES, style="bold", highlight=False, soft_wrap=True)
