"""RandLoRA in a flax.nnx training loop; the adapter opens in PyTorch PEFT.

python examples/with_nnx.py
"""

import numpy as np
import optax
import torch
from flax import nnx
from peft import PeftModel

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

rngs = nnx.Rngs(0)
net = nnx.Sequential(  # any module of yours
    nnx.Linear(8, 64, rngs=rngs),
    nnx.relu,
    nnx.Linear(64, 64, rngs=rngs),
    nnx.relu,
    nnx.Linear(64, 2, rngs=rngs),
)
config = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
model = get_peft_model(net, config, names={r"layers/(\d)": r"\1"})  # what PyTorch calls them
model.print_trainable_parameters()
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=AdapterParam)


@nnx.jit
def step(model, optimizer, x, y):
    """One step on one batch."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
    optimizer.update(model, grads)
    return value


x = np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32)
y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)  # have the first two one sign?
for i in range(201):
    value = step(model, optimizer, x[:1024], y[:1024])
    if i % 100 == 0:
        print(f"step {i}: loss {value:.3f}")
model.save_pretrained("out/examples/nnx")

# The same model in PyTorch, and the adapter on it.
linear, relu = torch.nn.Linear, torch.nn.ReLU
twin = torch.nn.Sequential(linear(8, 64), relu(), linear(64, 64), relu(), linear(64, 2))
for i in (0, 2, 4):
    twin[i].weight.data = torch.tensor(np.asarray(net.layers[i].kernel[...]).T)
    twin[i].bias.data = torch.tensor(np.asarray(net.layers[i].bias[...]))
theirs = PeftModel.from_pretrained(twin, "out/examples/nnx")(torch.tensor(x)).detach().numpy()
ours = np.asarray(model(x))
apart = abs(ours - theirs).max() / abs(theirs).max()
right = (ours.argmax(1) == y)[1024:].mean()
print(f"nnx: unseen points right {right:.3f}, logits in PyTorch PEFT within {apart:.1e} of them")
assert apart < 1e-5, "the adapter means something else in PyTorch"
