"""RandLoRA in a flax.nnx training loop; the adapter opens in PyTorch PEFT.

python examples/with_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from newswire import CONFIG, HIDDEN, WORDS, finish, prepare

from randlora_jax import AdapterParam, get_peft_model


class Net(nnx.Module):
    """The base model."""

    def __init__(self, classes: int) -> None:
        rngs = nnx.Rngs(0)
        self.trunk = nnx.List(
            [nnx.Linear(WORDS, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)]
        )
        self.head = nnx.Linear(HIDDEN, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (documents, classes)."""
        for layer in self.trunk:
            x = nnx.relu(layer(x))
        return self.head(x)


task = prepare()
net = Net(len(task.base["head.bias"]))
for name, layer in (("trunk.0", net.trunk[0]), ("trunk.1", net.trunk[1]), ("head", net.head)):
    layer.kernel[...] = jnp.asarray(task.base[f"{name}.weight"].T)
    layer.bias[...] = jnp.asarray(task.base[f"{name}.bias"])

model = get_peft_model(net, CONFIG)
optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=AdapterParam)


@nnx.jit
def step(model, optimizer, x, y):
    """One step on one batch."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
    optimizer.update(model, grads)


for x, y in task.batches(5, "RandLoRA, nnx"):
    step(model, optimizer, x, y)
finish("nnx", model, model, task)
