"""RandLoRA on a Haiku model; the adapter opens in PyTorch PEFT.

python examples/with_haiku.py
"""

import haiku as hk
import jax
import numpy as np
import optax
import torch
from peft import PeftModel

from randlora_jax import RandLoraConfig, get_peft_model

x = np.random.default_rng(0).normal(size=(2048, 8)).astype(np.float32)
y = (x[:, 0] * x[:, 1] > 0).astype(np.int32)  # have the first two one sign?

net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([64, 64, 2])(x)))  # any of yours
params = net.init(jax.random.key(0), x)
config = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
names = {"mlp/~/linear_0": "0", "mlp/~/linear_1": "2", "mlp/~/linear_2": "4"}  # in PyTorch
model = get_peft_model(params, config, views={".*": "i o"}, names=names)
model.print_trainable_parameters()
trained, frozen = model.split()
optimizer = optax.adamw(3e-3)
state = optimizer.init(trained)


@jax.jit
def step(trained, state, frozen, x, y):  # frozen is an argument: closed over, it would be constant
    """One step on one batch."""

    def loss(trained):
        params = model.merged({**frozen, "randlora": trained})  # W + delta_W
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value


for i in range(201):
    trained, state, value = step(trained, state, frozen, x[:1024], y[:1024])
    if i % 100 == 0:
        print(f"step {i}: loss {value:.3f}")
model.variables = {**frozen, "randlora": trained}
model.save_pretrained("out/examples/haiku")

# The same model in PyTorch, and the adapter on it.
linear, relu = torch.nn.Linear, torch.nn.ReLU
twin = torch.nn.Sequential(linear(8, 64), relu(), linear(64, 64), relu(), linear(64, 2))
for name, number in names.items():
    twin[int(number)].weight.data = torch.tensor(np.asarray(params[name]["w"]).T)
    twin[int(number)].bias.data = torch.tensor(np.asarray(params[name]["b"]))
theirs = PeftModel.from_pretrained(twin, "out/examples/haiku")(torch.tensor(x)).detach().numpy()
ours = np.asarray(net.apply(model.merged(model.variables), x))
apart = abs(ours - theirs).max() / abs(theirs).max()
right = (ours.argmax(1) == y)[1024:].mean()
print(f"haiku: unseen points right {right:.3f}, logits in PyTorch PEFT within {apart:.1e} of them")
assert apart < 1e-5, "the adapter means something else in PyTorch"
