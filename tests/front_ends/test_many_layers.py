"""Wrapping, adding, deleting and merging look at each module a fixed number of times."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.core import layer_call
from randlora_jax.front_ends import collections
from randlora_jax.front_ends.nnx import replacing
from randlora_jax.models import finding

CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules="all-linear")
X = jnp.ones((3, 4))


class Nnx(nnx.Module):
    def __init__(self, depth):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Linen(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.Dense(4)(x)
        return x


def linen(depth):
    module = Linen(depth)
    return module.bind(module.init(jax.random.key(0), X))


def pytree(depth):
    return linen(depth).variables["params"]


def life(model, folder):
    """All that happens to adapters."""
    model.save_pretrained(folder)
    model.load_adapter(folder, "loaded")
    model.add_adapter("second", CONFIG)
    model.set_adapter("second")
    model.merge_adapter()
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and set(model.peft_config) == {"loaded", "second"}


@pytest.fixture
def visits(monkeypatch):
    """How often a module, or a leaf of a tree, was looked at."""
    counted = {"visits": 0}

    def counting(walk):
        def walked(*args, **kwargs):
            for item in walk(*args, **kwargs):
                counted["visits"] += 1
                yield item

        return walked

    monkeypatch.setattr(nnx, "iter_modules", counting(nnx.iter_modules))
    layer_of = finding._layer

    def flattened(*args, **kwargs):
        leaves = flatten_dict(*args, **kwargs)
        counted["visits"] += len(leaves)
        return leaves

    def found(*args):
        counted["visits"] += 1
        return layer_of(*args)

    def replaced(*args):
        counted["visits"] += 1
        return swapped(*args)

    swapped = replacing._swapped
    monkeypatch.setattr(replacing, "_swapped", replaced)
    monkeypatch.setattr(collections, "flatten_dict", flattened)
    monkeypatch.setattr(finding, "_layer", found)
    return counted


@pytest.mark.filterwarnings("ignore:PEFT cannot open these adapters")
@pytest.mark.parametrize("make", [Nnx, linen, pytree], ids=["nnx", "linen", "pytree"])
def test_twice_the_layers_are_twice_the_visits(make, visits, tmp_path):
    found = []
    for depth in (8, 16, 32):
        model = make(depth)
        visits["visits"] = 0
        views = {"Dense_.*": "i o"} if make is pytree else {}
        life(get_peft_model(model, CONFIG, views=views), tmp_path / str(depth))
        found.append(visits["visits"])
    more = found[1] - found[0]
    assert more > 0 and found[2] - found[1] == 2 * more, found


@pytest.mark.parametrize("make", [Nnx, linen], ids=["nnx", "linen"])
def test_layers_that_are_alike_are_traced_once(make, monkeypatch):
    traced = []
    of_call = layer_call.LayerCall.in_kernel

    def counting(call, *args):
        traced.append(call)
        return of_call(call, *args)

    monkeypatch.setattr(layer_call.LayerCall, "in_kernel", counting)
    model = get_peft_model(make(24), CONFIG, apply="merged")
    x = jnp.ones((37, 4))  # a size that no other test has traced
    if make is Nnx:
        graph, state = nnx.split(model)
        jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    else:
        jax.jit(model.apply).lower(model.variables, x)
    assert len(traced) == 1
