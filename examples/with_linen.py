"""RandLoRA in a flax.linen training loop with TrainState; the adapter opens in PyTorch PEFT.

python examples/with_linen.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from newswire import CONFIG, HIDDEN, finish, prepare

from randlora_jax import get_peft_model


class Net(nn.Module):
    """The base model."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (documents, classes)."""
        for i in range(2):
            x = nn.relu(nn.Dense(HIDDEN, name=f"trunk_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


task = prepare()
params = {
    name.replace(".", "_"): {
        "kernel": jnp.asarray(task.base[f"{name}.weight"].T),
        "bias": jnp.asarray(task.base[f"{name}.bias"]),
    }
    for name in ("trunk.0", "trunk.1", "head")
}
net = Net(len(task.base["head.bias"])).bind({"params": params})

model = get_peft_model(net, CONFIG, names={r"trunk_(\d)": r"trunk.\1"})
frozen = dict(model.variables)
state = TrainState.create(apply_fn=model.apply, params=frozen.pop("randlora"), tx=optax.adamw(2e-3))


@jax.jit
def step(state, frozen, x, y):
    """One step on one batch."""

    def loss(trained):
        logits = state.apply_fn({**frozen, "randlora": trained}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


for x, y in task.batches(5, "RandLoRA, linen"):
    state = step(state, frozen, x, y)
model.variables = {**frozen, "randlora": state.params}
finish("linen", model, lambda x: model.apply(model.variables, x), task)
