"""The loop of the libraries whose models are functions of a params pytree."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from newswire import Task, finish

Tree = Any


def train(name: str, model: Any, forward: Callable[[Tree, Any], jax.Array], task: Task) -> None:
    """Train the adapter of a wrapped params pytree, export it; forward: (params, x) -> logits."""
    frozen = dict(model.variables)
    trained, tx = frozen.pop("randlora"), optax.adamw(2e-3)

    @jax.jit
    def step(trained: Tree, state: Tree, frozen: Tree, x: Any, y: Any) -> tuple[Tree, Tree]:
        def loss(trained: Tree) -> jax.Array:
            params = model.merged({**frozen, "randlora": trained})  # W + delta_W
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    state = tx.init(trained)
    for x, y in task.batches(5, f"RandLoRA, {name}"):
        trained, state = step(trained, state, frozen, x, y)
    model.variables = {**frozen, "randlora": trained}
    finish(name, model, lambda x: forward(model.merged(model.variables), x), task)
