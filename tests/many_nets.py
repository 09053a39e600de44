"""nnx models with several adapters, and what each gives alone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

IDS = jax.random.randint(jax.random.key(0), (4, 5), 0, 11)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
    """Words in, blocks in a list, a head."""

    def __init__(self, rngs):
        self.emb = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([Block(8, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


CONFIGS = {  # other layers, other r and kind, modules trained whole, biases; one pair and others
    "a": RandLoraConfig(r=3, randlora_alpha=60, target_modules=["up"]),
    "b": RandLoraConfig(
        r=3,
        target_modules=["up", "down"],
        modules_to_save=["head", "norm"],
        bias="randlora_only",
    ),
    "c": RandLoraConfig(
        r=2, randlora_alpha=6, sparse=True, target_modules=["down"], modules_to_save=["emb"]
    ),
    "d": RandLoraConfig(r=3, randlora_alpha=9, target_modules=["down"]),
}
NAMES = ["c", "__base__", "b", "a"]


def move(model, adapter_name, seed=0, by=0.3):
    """Gives an adapter numbers, as if it had been trained, and leaves active what was."""
    active = model.active_adapters
    model.set_adapter(adapter_name)
    state = nnx.state(model, AdapterParam)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x + by * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    model.set_adapter(active)


def adapted(base=None, configs=None, **rules):
    """A model with an adapter of each configuration."""
    configs = configs or CONFIGS
    (first, config), *more = configs.items()
    model = get_peft_model(base or Net(nnx.Rngs(0)), config, adapter_name=first, **rules)
    for name, config in more:
        model.add_adapter(name, config)
    for seed, name in enumerate(configs):
        move(model, name, seed)
    return model


def stacked(capacity=5, parts=2):
    """That model, its adapters in stacks."""
    model = adapted()
    model.stack_adapters(capacity, parts=parts)
    return model


@nnx.jit
def by_row(model, x, rows=None):
    """The model, compiled."""
    return model(x, adapter_names=rows)


def alone(model, x):
    """What the model gives with each adapter, and with none."""
    active, found = model.active_adapters, {}
    for name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        found[name] = np.asarray(by_row(model, x))
    model.set_adapter(active)
    with model.disable_adapter():
        found["__base__"] = np.asarray(by_row(model, x))
    for name, out in found.items():
        others = [found[other] for other in found if other != name]
        assert all(np.abs(out - other).max() > 1e-2 * np.abs(out).max() for other in others)
    return found


@functools.cache
def each_alone():
    """What the adapters of `CONFIGS` give."""
    return alone(adapted(), IDS)


def same_rows(found, each, names, tolerance=1e-6):
    """Each row is what its own adapter gives alone."""
    expected = np.stack([each[name][i] for i, name in enumerate(names)])
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


def same_bits(found, base, names):
    """Rows of no adapter are the base model's to the bit."""
    rows = [i for i, name in enumerate(names) if name == "__base__"]
    assert rows
    np.testing.assert_array_equal(np.asarray(found)[rows], np.asarray(base)[rows])


def rotated(names):
    """All ways to go round."""
    return [[*names[i:], *names[:i]] for i in range(len(names))]


# Models of other structures: made by (), called with one array, layers to adapt, rules.


class Scanned(nnx.Module):
    """Layers stacked along an axis by vmap, and run by a user's own scan."""

    def __init__(self, axis, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=axis)
        def create(rngs):
            return Block(8, rngs)

        self.axis, self.remat = axis, remat
        self.layers = create(nnx.Rngs(0))

    def __call__(self, x):
        run = lambda x, block: block(x)  # noqa: E731
        along = nnx.scan(in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        return along(nnx.remat(run) if self.remat else run)(x, self.layers)


class Experts(nnx.Module):
    """Layers side by side, which all see the same rows."""

    def __init__(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(8, rngs)

        self.experts = create(nnx.Rngs(0))

    def __call__(self, x):
        each = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))(self.experts, x)
        return each.sum(0)


class Attention(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), (2, 4), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.join(nnx.tanh(self.split(x)) + nnx.tanh(self.einsum(x)))


class Tanh(nnx.Linear):
    """Which nobody knows as a sum."""

    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


class Convolved(nnx.Module):
    """Layers among convolutions, which take no adapters; containers.

    Args:
      first: the class of the first layer.
    """

    def __init__(self, first=nnx.Linear):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.named = nnx.data(
            {"first": first(8, 8, rngs=rngs), "second": nnx.Linear(8, 8, rngs=rngs)}
        )

    def __call__(self, x):
        return self.named["second"](self.named["first"](self.conv(x)))


class Tied(nnx.Module):
    """One layer under two names, called twice."""

    def __init__(self):
        self.one = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.two = nnx.List([self.one])

    def __call__(self, x):
        return self.two[0](nnx.relu(self.one(x)))


X = jax.random.normal(jax.random.key(1), (4, 5, 8))
STRUCTURES = {
    "scan": (lambda: Scanned(0), {"views": {"layers/(up|down)": "s i o"}}),
    "remat in a scan along 1": (
        lambda: Scanned(1, remat=True),
        {"views": {"layers/(up|down)": "i s o"}},
    ),
    "scan along -1": (lambda: Scanned(-1), {"views": {"layers/(up|down)": "i o s"}}),
    "vmap": (Experts, {"views": {"experts/(up|down)": "s i o"}}),
    "attention, einsum": (Attention, {}),
    "convolutions": (Convolved, {}),
    "tied": (Tied, {}),
}


def structured(kind):
    """A model of another structure with two adapters."""
    make, rules = STRUCTURES[kind]
    bias = "none" if "views" in rules else "all"  # a stack's leaves are not trained whole by row
    configs = {
        "a": RandLoraConfig(r=3, randlora_alpha=6, target_modules="all-linear"),
        "b": RandLoraConfig(r=2, randlora_alpha=8, target_modules="all-linear", bias=bias),
    }
    return adapted(make(), configs, **rules)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(nn.relu(nn.Dense(12, name="up")(x)))


class Bridged(nnx.Module):
    """A linen module inside, between two layers of nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.before = nnx.Linear(8, 8, rngs=rngs)
        self.inner = nnx.bridge.ToNNX(Plain(), rngs=rngs).lazy_init(X)
        self.after = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.after(self.inner(self.before(x)))
