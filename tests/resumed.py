"""A training run that goes on where its last checkpoint ended; `test_resume` kills and repeats it.

    python tests/resumed.py KIND FOLDER STEPS       KIND: nnx or linen

The checkpoint holds the trained leaves, the optimizer's state and the step. The base model and the
bases are made anew from their seeds, so neither is stored. Prints a digest of all that trains.
"""

import hashlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from mlp import TARGETS, X, linen_net, nnx_net, torch_net

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=5, randlora_alpha=10, target_modules=TARGETS)
TX = optax.adamw(optax.cosine_decay_schedule(1e-2, 50))


def batch(step):
    rng = np.random.default_rng(step)
    return X[rng.permutation(len(X))[:4]]


def nnx_run():
    """The state to be kept, how to put it back, and a step."""
    model = get_peft_model(nnx_net(torch_net()), CONFIG)
    optimizer = nnx.Optimizer(model, TX, wrt=AdapterParam)

    @nnx.jit
    def train(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model))

    def kept():
        state = {"trained": nnx.state(model, AdapterParam), "optimizer": nnx.state(optimizer)}
        return nnx.to_pure_dict(nnx.State(state))

    def put_back(values):
        for part, owner in (("trained", model), ("optimizer", optimizer)):
            state = nnx.state(owner, AdapterParam) if owner is model else nnx.state(owner)
            nnx.replace_by_pure_dict(state, values[part])
            nnx.update(owner, state)

    return kept, put_back, lambda x: train(model, optimizer, jnp.asarray(x))


def linen_run():
    """The same for linen: plain trees."""
    model = get_peft_model(linen_net(torch_net()), CONFIG)
    frozen = dict(model.variables)
    now = {"trained": frozen.pop("randlora")}
    now["optimizer"] = TX.init(now["trained"])

    @jax.jit
    def train(trained, state, frozen, x):
        def loss(trained):
            return (model.apply({**frozen, "randlora": trained}, x) ** 2).mean()

        updates, state = TX.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    def step(x):
        now["trained"], now["optimizer"] = train(now["trained"], now["optimizer"], frozen, x)

    return lambda: dict(now), now.update, step


def main(kind: str, folder: str, steps: str) -> None:
    kept, put_back, step = {"nnx": nnx_run, "linen": linen_run}[kind]()
    with ocp.CheckpointManager(Path(folder).resolve()) as manager:
        done = manager.latest_step() or 0
        if done:
            put_back(manager.restore(done, args=ocp.args.StandardRestore(kept())))
            print(f"resumed at {done}", file=sys.stderr)
        for i in range(done, int(steps)):
            step(batch(i))
            manager.save(i + 1, args=ocp.args.StandardSave(kept()))
        manager.wait_until_finished()
    leaves = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(kept()))
    print(hashlib.sha256(leaves).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
