"""RandLoRA on an Equinox model; the adapter opens in PyTorch PEFT.

python examples/with_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from functional import train
from newswire import CONFIG, HIDDEN, WORDS, prepare

from randlora_jax import get_peft_model


class Net(eqx.Module):
    """The base model."""

    trunk: list[eqx.nn.Linear]
    head: eqx.nn.Linear

    def __init__(self, classes: int) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        self.trunk = [
            eqx.nn.Linear(WORDS, HIDDEN, key=keys[0]),
            eqx.nn.Linear(HIDDEN, HIDDEN, key=keys[1]),
        ]
        self.head = eqx.nn.Linear(HIDDEN, classes, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (classes,) of one document."""
        for layer in self.trunk:
            x = jax.nn.relu(layer(x))
        return self.head(x)


task = prepare()
net = Net(len(task.base["head.bias"]))
params, static = eqx.partition(net, eqx.is_array)
for name in ("trunk.0", "trunk.1", "head"):
    where = lambda n, name=name: n.head if name == "head" else n.trunk[int(name[-1])]  # noqa: E731
    weights = tuple(jnp.asarray(task.base[f"{name}.{leaf}"]) for leaf in ("weight", "bias"))
    params = eqx.tree_at(lambda n, w=where: (w(n).weight, w(n).bias), params, weights)

model = get_peft_model(params, CONFIG, views={r"trunk/\d|head": "o i"})
train("equinox", model, lambda p, x: jax.vmap(eqx.combine(p, static))(x), task)
