"""RandLoRA in a flax.linen training loop with TrainState; the adapter opens in PyTorch PEFT.

python examples/with_linen.py
"""

import flax.linen as nn
import jax
import numpy as np
import optax
import torch
from flax.training.train_state import TrainState
from peft import PeftModel

from randlora_jax import RandLoraConfig, get_peft_model

x = np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32)
y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)  # have the first two one sign?

net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(2)])  # any of yours
variables = net.init(jax.random.key(0), x)
config = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
names = {r"layers_(\d)": r"\1"}  # what PyTorch calls them
model = get_peft_model(net.bind(variables), config, names=names)
model.print_trainable_parameters()
trained, frozen = model.split()
state = TrainState.create(apply_fn=model.apply, params=trained, tx=optax.adamw(3e-3))


@jax.jit
def step(state, frozen, x, y):  # frozen is an argument: closed over, it would be a constant
    """One step on one batch."""

    def loss(trained):
        logits = state.apply_fn({**frozen, "randlora": trained}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


for i in range(201):
    state, value = step(state, frozen, x[:1024], y[:1024])
    if i % 100 == 0:
        print(f"step {i}: loss {value:.3f}")
model.variables = {**frozen, "randlora": state.params}
model.save_pretrained("out/examples/linen")

# The same model in PyTorch, and the adapter on it.
linear, relu = torch.nn.Linear, torch.nn.ReLU
twin = torch.nn.Sequential(linear(8, 64), relu(), linear(64, 64), relu(), linear(64, 2))
for i in (0, 2, 4):
    params = variables["params"][f"layers_{i}"]
    twin[i].weight.data = torch.tensor(np.asarray(params["kernel"]).T)
    twin[i].bias.data = torch.tensor(np.asarray(params["bias"]))
theirs = PeftModel.from_pretrained(twin, "out/examples/linen")(torch.tensor(x)).detach().numpy()
ours = np.asarray(model(x))
apart = abs(ours - theirs).max() / abs(theirs).max()
right = (ours.argmax(1) == y)[1024:].mean()
print(f"linen: unseen points right {right:.3f}, logits in PyTorch PEFT within {apart:.1e} of them")
assert apart < 1e-5, "the adapter means something else in PyTorch"
