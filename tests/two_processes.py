"""One of two processes that train one model on one mesh and save one adapter.

python tests/two_processes.py ADDRESS NUMBER FOLDER     NUMBER: 0 or 1; "alone" for one process
"""

import sys
from pathlib import Path

import flax.linen as nn
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

address, number, folder = sys.argv[1:]
if number != "alone":
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))

# the head is trained whole, and is cut too: saving has to gather it
CUTS = {"up": P("data", None), "down": P(None, "data"), "head": P("data", None)}
CONFIG = RandLoraConfig(
    r=8, randlora_alpha=16, target_modules=["up", "down"], modules_to_save=["head"]
)
X = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
TX = optax.sgd(1e-1)


class Net(nn.Module):
    """The base model."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(64, name="up")(x))
        return nn.Dense(8, name="head")(x + nn.Dense(32, name="down")(h))


mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
everywhere = NamedSharding(mesh, P())


def placed(path, leaf):
    spec = CUTS[path[1].key] if leaf.ndim == 2 else P()
    return jax.device_put(np.asarray(leaf), NamedSharding(mesh, spec))


net = Net()
variables = jax.tree_util.tree_map_with_path(placed, net.init(jax.random.key(0), jnp.asarray(X)))
model = get_peft_model(net.bind(variables), CONFIG, token_axes=["data"])
frozen = dict(model.variables)
trained = frozen.pop("randlora")
state = TX.init(trained)
x = jax.device_put(X, NamedSharding(mesh, P("data")))


@jax.jit
def step(trained, state, frozen, x):
    """One step."""

    def loss(trained):
        return (model.apply({**frozen, "randlora": trained}, x) ** 2).mean()

    updates, state = TX.update(jax.grad(loss)(trained), state, trained)
    return optax.apply_updates(trained, updates), state


class Hub:
    """In the place of the hub's client: takes one push, of a whole directory."""

    def __init__(self, **_):
        pass

    def create_repo(self, *_, **__):
        pass

    def upload_folder(self, folder_path, **_):
        with Path(f"{folder}-pushed").open("x") as file:  # a second one fails
            file.write(" ".join(sorted(p.name for p in Path(folder_path).iterdir())))
        return "commit"


for _ in range(5):
    trained, state = step(trained, state, frozen, x)
model.variables = {**frozen, "randlora": trained}
model.save_pretrained(folder)
written = sorted(p.name for p in Path(folder).iterdir())
huggingface_hub.HfApi = Hub
assert model.push_to_hub("me/x") == ("commit" if jax.process_index() == 0 else None)
again = RandLoraModel.from_pretrained(net.bind(variables), folder, token_axes=["data"])
run = jax.jit(lambda v, x: again.apply(v, x), out_shardings=everywhere)
print("saved", written, float(jnp.sum(run(again.variables, x))))
