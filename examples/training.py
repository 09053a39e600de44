"""One training loop for any model that is a function of (trained, frozen) arrays."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from reuters import Documents
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Item = TypeVar("Item")
Tree = Any

# (trained, frozen, fields) -> logits (documents, classes)
Logits = Callable[[Tree, Tree, dict[str, Any]], jax.Array]


@dataclass(frozen=True)
class Settings:
    """How to train: AdamW, linear warm-up, cosine decay, gradients clipped by their norm.

    The base model's dropout stays off: these runs are too short to overfit, and it slows them.

    Args:
      head_rate: the learning rate of a classifier that is trained whole; the same where None. A
        new one begins at random, and wants a higher rate than adapters, which begin at the base.
    """

    learning_rate: float
    head_rate: float | None = None
    epochs: float = 1.0
    batch_size: int = 32
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0


@dataclass
class Curve:
    """What a run looked like: a loss for each step, accuracy on held-back documents at some."""

    losses: list[float] = field(default_factory=list)
    checked_at: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds_per_step: float = 0.0
    seconds: float = 0.0


class SecondsLeft(ProgressColumn):
    """The time a bar still needs."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        left = task.time_remaining
        return Text("" if left is None else f"{left:.0f} s left", style="progress.remaining")


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yields `items` under a progress bar that says how many seconds are left; no bar untitled."""
    columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), SecondsLeft()
    with Progress(*columns, disable=not title) as progress:
        yield from progress.track(items, total=total, description=title)


def run_all(title: str, *jobs: Callable[[], Any]) -> list[Any]:
    """What each job returns, in order, under one progress bar."""
    return [job() for job in track(jobs, title, len(jobs))]


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW behind clipping; only what may shrink to zero without harm is decayed."""
    warmup = round(settings.warmup_share * steps)

    def decayed(tree: Tree) -> Tree:
        # lambda = 0 is the base model and a kernel is a kernel; gamma and biases are left alone
        names = ("randlora_lambda", "kernel")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, tree)

    def adamw(peak: float) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
        return optax.adamw(rate, weight_decay=settings.weight_decay, mask=decayed)

    def parts(tree: Tree) -> Tree:
        def part(path: tuple[Any, ...], _: Any) -> str:
            return "head" if any(step.key == "classifier" for step in path) else "rest"

        return jax.tree_util.tree_map_with_path(part, tree)

    steps_by = adamw(settings.learning_rate)
    if settings.head_rate is not None:
        rates = {"rest": steps_by, "head": adamw(settings.head_rate)}
        steps_by = optax.multi_transform(rates, parts)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), steps_by)


def fit(
    logits: Logits,
    trained: Tree,
    frozen: Tree,
    train: Documents,
    held: Documents,
    settings: Settings,
    title: str,
    checks: int = 6,
) -> tuple[Tree, Curve]:
    """Trains `trained` on `train`; returns it and the curve, checked `checks` times on `held`."""
    steps = round(settings.epochs * len(train) / settings.batch_size)
    tx = optimizer(settings, steps)

    # The frozen arrays are an argument: closed over, they would become constants of the program.
    @jax.jit
    def step(trained: Tree, state: Tree, frozen: Tree, batch: Documents) -> Any:
        def loss(trained: Tree) -> jax.Array:
            scores = logits(trained, frozen, batch.fields)
            return optax.softmax_cross_entropy_with_integer_labels(scores, batch.labels).mean()

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    shuffle = np.random.default_rng(settings.seed)
    orders = [shuffle.permutation(len(train)) for _ in range(math.ceil(settings.epochs) + 1)]
    rows = np.concatenate(orders)[: steps * settings.batch_size]

    curve, times, state = Curve(), [], tx.init(trained)
    predict = jax.jit(logits)

    def check(done: int) -> None:
        curve.checked_at.append(done)
        curve.accuracies.append(accuracy(predict_all(predict, trained, frozen, held), held))

    check_at = set(np.linspace(0, steps, checks + 1).round().astype(int).tolist() if checks else ())
    began = time.perf_counter()
    if checks:
        check(0)
    for done, batch_rows in enumerate(track(rows.reshape(steps, -1), title, steps)):
        started = time.perf_counter()
        batch = train.take(batch_rows)
        trained, state, value = step(trained, state, frozen, batch)
        curve.losses.append(float(value))
        times.append(time.perf_counter() - started)
        if done + 1 in check_at:
            check(done + 1)
    curve.seconds_per_step = float(np.median(times))
    curve.seconds = time.perf_counter() - began
    return trained, curve


def predict_all(
    logits: Callable[..., Any],
    trained: Tree,
    frozen: Tree,
    documents: Documents,
    title: str = "",
    size: int = 64,
) -> np.ndarray:
    """Logits (documents, classes), `size` at a time; with a progress bar where there is a title."""
    batches = documents.batches(size)
    total = -(-len(documents) // size)
    found = [
        np.asarray(logits(trained, frozen, batch.fields)) for batch in track(batches, title, total)
    ]
    return np.concatenate(found)[: len(documents)]


def accuracy(logits: np.ndarray, documents: Documents) -> float:
    """Share of documents whose class has the largest logit."""
    return float((logits.argmax(-1) == documents.labels).mean())
