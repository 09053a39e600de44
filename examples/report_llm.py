"""The tables that the language model's demonstration prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tables import print_rows


def print_words(console: Console, words: Mapping[str, Sequence[str]], shown: int = 6) -> None:
    """What each side said to the first prompts, side by side."""
    table = Table(title="The same prompts, continued greedily")
    for name in words:
        table.add_column(name, overflow="fold")
    for said in list(zip(*words.values(), strict=True))[:shown]:
        table.add_row(*said)
    console.print(table)


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The figures that matter."""
    numbers = results["trainable_parameters"]
    rows = {
        "documents tested": f"{results['test_documents']:,}",
        "accuracy, untouched model": f"{results['untouched_test_accuracy']:.4f}",
        f"accuracy, RandLoRA, {numbers:,} numbers trained": f"{results['test_accuracy']:.4f}",
    }
    if "lora_test_accuracy" in results:
        lora_numbers = results["lora_trainable_parameters"]
        rows[f"accuracy, LoRA, {lora_numbers:,} numbers trained"] = (
            f"{results['lora_test_accuracy']:.4f}"
        )
    if "full_fine_tuning" in results:
        rows["accuracy, full fine-tuning"] = f"{results['full_fine_tuning']['test_accuracy']:.4f}"
    largest = results["largest_logit"]
    rows["largest logit difference of the untouched model in PyTorch"] = (
        f"{results['untouched_logit_difference'] / largest:.1e} of the largest logit"
    )
    for name, found in results["in_pytorch"].items():
        rows[f"in PyTorch, {name}: logits, topics, prompts continued"] = (
            f"within {found['logit_difference'] / largest:.1e} of the largest, "
            f"{found['other_topics']} of {found['test_documents']} others, "
            f"{found['same_words']} of {results['prompts']} the same"
        )
    rows["adapter on disk"] = f"{results['adapter_bytes'] / 1e6:.1f} MB"
    if "peft_adapter_bytes" in results:
        times = results["peft_adapter_bytes"] / results["adapter_bytes"]
        rows["the same, saved by PEFT"] = (
            f"{results['peft_adapter_bytes'] / 1e6:.1f} MB, {times:.0f} times as much"
        )
    rows |= {
        "a training step": f"{results['seconds_per_step']:.2f} s",
        "everything": f"{results['total_seconds']:.0f} s",
    }
    print_rows(console, rows)
