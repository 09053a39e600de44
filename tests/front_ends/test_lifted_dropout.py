"""Adapter dropout of linen layers under flax's transformations: drawn there, or refused by name."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from linen_nets import CONFIG, X, close, wrapped

from randlora_jax import ConfigError

DROPPING = dataclasses.replace(CONFIG, randlora_dropout=0.5)
SPLIT, NOT_SPLIT = {"params": True, "dropout": True}, {"params": True}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(8, name="up")(x), None


class Net(nn.Module):
    """Layers in a scan, a vmap, a loop or nn.remat; of one name all: a."""

    kind: str
    hands_on: bool

    @nn.compact
    def __call__(self, x):
        split = SPLIT if self.hands_on else NOT_SPLIT
        if self.kind == "scan":
            lifted = nn.scan(Block, variable_axes={"params": 0}, split_rngs=split, length=3)
            return lifted(name="a")(x, None)[0]
        if self.kind == "vmap":
            more = {"in_axes": None, "axis_size": 3}
            lifted = nn.vmap(Block, variable_axes={"params": 0}, split_rngs=split, **more)
            return lifted(name="a")(x)[0].mean(0)
        block = Block(name="a")
        if self.kind == "remat":
            rngs = bool(self.hands_on) or "params"
            return nn.remat(lambda block, x: block(x), rngs=rngs)(block, x)[0]
        if self.is_initializing():
            return block(x)[0]
        more, step = (lambda m, s: s[0] < 2), (lambda m, s: (s[0] + 1, m(s[1])[0]))
        split = dict.fromkeys(split, False)
        return nn.while_loop(more, step, block, (0, x), split_rngs=split)[1]


KINDS = ["scan", "vmap", "remat", "loop"]


def dropping(kind, hands_on):
    model = wrapped(Net(kind, hands_on), X, sample_inputs=(X,), config=DROPPING)
    return model, lambda seed: model(X, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_rng_that_is_not_handed_on_is_refused_by_name(kind):
    model, run = dropping(kind, hands_on=False)
    words = r"'a.up': adapter dropout is on.*'dropout'.*split_rngs={..., 'dropout': True}"
    with pytest.raises(ConfigError, match=words):
        run(1)
    expected = dropping(kind, hands_on=True)[0](X)
    np.testing.assert_array_equal(model(X), expected)  # off, without the rng
    close(expected, model.merge_and_unload()(X))


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_drops(kind):
    model, run = dropping(kind, hands_on=True)
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2)) and not np.allclose(run(1), model(X))


def test_rows_are_refused_with_it_too():
    model, _ = dropping("scan", hands_on=False)
    with pytest.raises(ConfigError, match=r"'default' has dropout, which a dropout rng turns on"):
        model(X, adapter_names=["default"] * 5, rngs={"dropout": jax.random.key(1)})
