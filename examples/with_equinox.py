"""RandLoRA on an Equinox model; the adapter opens in PyTorch PEFT.

python examples/with_equinox.py
"""

import equinox as eqx
import jax
import numpy as np
import optax
import torch
from peft import PeftModel

from randlora_jax import RandLoraConfig, get_peft_model

net = eqx.nn.MLP(8, 2, 64, depth=2, key=jax.random.key(0))  # any module of yours
params, static = eqx.partition(net, eqx.is_array)
config = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
names = {"layers/0": "0", "layers/1": "2", "layers/2": "4"}  # what PyTorch calls them
model = get_peft_model(params, config, views={r"layers/\d": "o i"}, names=names)
model.print_trainable_parameters()
trained, frozen = model.split()
optimizer = optax.adamw(3e-3)
state = optimizer.init(trained)


def logits(trained, frozen, x):
    """The model with its adapter, on a batch."""
    params = model.merged({**frozen, "randlora": trained})  # W + delta_W
    return jax.vmap(eqx.combine(params, static))(x)


@jax.jit
def step(trained, state, frozen, x, y):  # frozen is an argument: closed over, it would be constant
    """One step on one batch."""

    def loss(trained):
        scores = logits(trained, frozen, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value


x = np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32)
y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)  # have the first two one sign?
for i in range(201):
    trained, state, value = step(trained, state, frozen, x[:1024], y[:1024])
    if i % 100 == 0:
        print(f"step {i}: loss {value:.3f}")
model.variables = {**frozen, "randlora": trained}
model.save_pretrained("out/examples/equinox")

# The same model in PyTorch, and the adapter on it.
linear, relu = torch.nn.Linear, torch.nn.ReLU
twin = torch.nn.Sequential(linear(8, 64), relu(), linear(64, 64), relu(), linear(64, 2))
for i, layer in zip((0, 2, 4), net.layers, strict=True):
    twin[i].weight.data = torch.tensor(np.asarray(layer.weight))
    twin[i].bias.data = torch.tensor(np.asarray(layer.bias))
theirs = PeftModel.from_pretrained(twin, "out/examples/equinox")(torch.tensor(x)).detach().numpy()
ours = np.asarray(logits(trained, frozen, x))
apart = abs(ours - theirs).max() / abs(theirs).max()
right = (ours.argmax(1) == y)[1024:].mean()
print(
    f"equinox: unseen points right {right:.3f}, logits in PyTorch PEFT within {apart:.1e} of them"
)
assert apart < 1e-5, "the adapter means something else in PyTorch"
