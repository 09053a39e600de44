"""One of two processes that train one model on one mesh, save one adapter and merge it.

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
from jax.experimental import multihost_utils
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
# as a user may lay them: lambda by its rank, gamma by its columns
cut = {2: {8: P("data"), 4: P(None, "data"), 32: P("data", None)}, 1: {8: P()}}
trained = jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, cut[x.ndim][x.shape[0]])), trained
)
model.variables = {**frozen, "randlora": trained}

gathered, gather = [], multihost_utils.process_allgather
multihost_utils.process_allgather = lambda x, **how: gathered.append(x.shape) or gather(x, **how)
model.save_pretrained(folder)
if number != "alone":  # the adapter's own leaves alone: lambda, gamma and the head, each once
    arrays = filter(None, gathered)  # processes wait for each other by a number
    assert sorted(arrays) == sorted(x.shape for x in jax.tree.leaves(trained) if x.ndim == 2)
written = sorted(p.name for p in Path(folder).iterdir())
huggingface_hub.HfApi = Hub
assert model.push_to_hub("me/x") == ("commit" if jax.process_index() == 0 else None)
again = RandLoraModel.from_pretrained(net.bind(variables), folder, token_axes=["data"])
run = jax.jit(lambda v, x: again.apply(v, x), out_shardings=everywhere)
adapted = run(again.variables, x)


def kernels():
    """What this process holds of them."""
    layers = again.variables["params"]
    found = {name: layers[name]["kernel"] for name in ("up", "down")}
    assert all(
        x.sharding == variables["params"][name]["kernel"].sharding for name, x in found.items()
    )
    return [np.asarray(part.data) for x in found.values() for part in x.addressable_shards]


gathered.clear()
before = kernels()
again.merge_adapter(safe_merge=True)
share = 1 if number == "alone" else 2
assert again.merged_bytes == 4 * 2 * 32 * 64 // share  # each process keeps its own part
assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(kernels(), before, strict=True))
np.testing.assert_allclose(run(again.variables, x), adapted, rtol=1e-4, atol=1e-5)
again.unmerge_adapter()
for x_now, x_then in zip(kernels(), before, strict=True):
    np.testing.assert_array_equal(x_now, x_then)
assert not gathered
print("saved", written, float(jnp.sum(adapted)))
