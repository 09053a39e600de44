"""Linen models with three adapters side by side, for tests of rows that choose among them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import RandLoraConfig, get_peft_model

IDS = jax.random.randint(jax.random.key(0), (5, 4), 0, 11)
NAMES = ["b", "__base__", "c", "a", "b"]

# Of other ranks, kinds and targets; biases, and modules trained whole that others adapt.
CONFIGS = {
    "a": {"r": 3, "target_modules": ["up", "down"], "modules_to_save": ["head", "norm"]},
    "b": {"r": 3, "target_modules": ["up"], "modules_to_save": ["down"], "bias": "all"},
    "c": {"r": 2, "target_modules": ["down"], "modules_to_save": ["embed"], "sparse": True},
}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.Dense(12, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y), None


# made once: of a class made in each call nn.jit would keep nothing that it compiled
BLOCKS = {"": Block, "remat": nn.remat(Block), "jit": nn.jit(Block)}


class Net(nn.Module):
    """Ids (batch, tokens) to logits (batch, tokens, 3); `wrap` is around each block."""

    wrap: str = ""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embed")(ids)
        kind = BLOCKS[self.wrap]
        for i in range(2):
            x, _ = kind(name=f"block_{i}")(x)
        return nn.Dense(3, name="head")(x)

    def twice(self, ids):
        return 2 * self(ids)


class Scanned(nn.Module):
    """Its three blocks in arrays stacked along `axis`."""

    axis: int = 0

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="embed")(ids)
        along = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(Block), length=3, **along)(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


def moved(model, seed=0):
    """With other numbers in the trained leaves of the active adapter."""
    trained, frozen = model.split()
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed + 10), len(leaves))
    leaves = [
        x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)
    ]
    model.variables = {**frozen, "randlora": jax.tree.unflatten(tree, leaves)}


def adapted(net=None, configs=CONFIGS, inputs=IDS, **rules):
    """A wrapped model with the adapters of `configs`, and the bound module under it."""
    net = net or Net()
    variables = net.init(jax.random.key(0), inputs)
    noise = jax.random.normal(jax.random.key(1), (12,))

    def filled(x):  # biases that are zero would hide what is done to them
        return x + 0.1 * jnp.resize(noise, x.shape)

    bound = net.bind(jax.tree.map(filled, variables))
    model = None
    for i, (name, config) in enumerate(configs.items()):
        config = RandLoraConfig(**config)
        if model is None:
            model = get_peft_model(bound, config, adapter_name=name, **rules)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        moved(model, i)
    return model, bound


def alone(model, bound, x=IDS):
    """What each adapter alone makes of `x`, and the base model, by name; all differ."""
    found = {"__base__": bound(x)}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = model(x)
    outputs = list(found.values())
    for i, a in enumerate(outputs):
        assert all(np.abs(a - b).max() > 0.01 for b in outputs[:i])
    return {name: np.asarray(y) for name, y in found.items()}


def assert_rows(found, names, each, base=None):
    """Every row of `found` is its own adapter's, but for roundings; base rows to the bit.

    Some processors round one program otherwise than another by a little more than 1e-6.

    Args:
      base: what the same program makes of rows without adapters; XLA may round one that has no
        adapters at all otherwise, where it compiles more than single operations.
    """
    expected = np.stack([each[name][i] for i, name in enumerate(names)])
    found = np.asarray(found)
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()
    for i, name in enumerate(names):
        if name == "__base__":
            np.testing.assert_array_equal(found[i], (expected if base is None else base)[i])
