"""Adapter dropout of nnx layers that scans take apart: each has a key of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["up"], randlora_dropout=0.5)
X = jnp.ones((2, 8))


class Block(nnx.Module):
    def __init__(self, rngs, own):
        self.up = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs) if own else None

    def __call__(self, x):
        x = self.up(x)
        return self.drop(x) if self.drop else x


class Scanned(nnx.Module):
    """A user's own scan; each block's output is kept, so that their masks can be compared."""

    def __init__(self, axis=0, splits=False, own=False):
        make = nnx.vmap(lambda rngs: Block(rngs, own), in_axes=0, out_axes=axis)
        self.blocks = nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))
        kernel = self.blocks.up.kernel
        kernel[...] = jnp.zeros_like(kernel[...])  # then what is seen is the adapter's alone
        self.axis, self.splits = axis, splits

    def __call__(self, x):
        run = nnx.scan(lambda x, block: (x, block(x)), in_axes=(nnx.Carry, self.axis))
        return (nnx.split_rngs(splits=3)(run) if self.splits else run)(x, self.blocks)[1]


def wrapped(seed=5, **kind):
    model = get_peft_model(Scanned(**kind), CONFIG, rngs=nnx.Rngs(seed))
    held = model.model.blocks.up
    for leaves in held.randlora_lambda.values():
        leaves["kernel"][...] = jnp.ones_like(leaves["kernel"][...])
    return model


@pytest.mark.parametrize(
    "kind",
    [{}, {"splits": True}, {"own": True}, {"axis": 1}, {"axis": -1}],
    ids=lambda kind: str(kind) or "scan",
)
@pytest.mark.parametrize("run", [lambda m, x: m(x), nnx.jit(lambda m, x: m(x))])
def test_every_layer_of_a_scan_drops_by_its_own_key(kind, run):
    model = wrapped(**kind)
    model.train()
    first, second = run(model, X), run(model, X)
    assert not np.allclose(first, second)
    assert not np.allclose(first[0], first[1])
    np.testing.assert_array_equal(first, run(wrapped(**kind), X))
    model.eval()
    np.testing.assert_array_equal(run(model, X), run(model, X))
    np.testing.assert_allclose(run(model, X)[0, 0], run(model, X)[0, 1])


def test_its_keys_are_shaped_as_those_of_the_models_own_dropout():
    blocks = wrapped(own=True).model.blocks
    ours, own = blocks.up.randlora_dropout["default"].rngs, blocks.drop.rngs
    assert (ours.key.shape, ours.count.shape) == (own.key.shape, own.count.shape) == ((3,), (3,))


def test_a_checkpoint_goes_on_with_the_same_masks(tmp_path):
    model, other = wrapped(), wrapped(seed=6)
    for m in (model, other):
        m.train()
    model(X)
    with ocp.StandardCheckpointer() as checkpointer:
        states = [nnx.to_pure_dict(nnx.state(m, nnx.RngState)) for m in (model, other)]
        plain, like = (jax.tree.map(_numbers, state) for state in states)
        checkpointer.save(tmp_path / "rngs", plain)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "rngs", like)
    state = nnx.state(other, nnx.RngState)
    nnx.replace_by_pure_dict(state, jax.tree.map(_keys, restored, states[1]))
    nnx.update(other, state)
    np.testing.assert_array_equal(model(X), other(X))


def _numbers(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _keys(x, like):
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(x) if is_key else jnp.asarray(x)


class Experts(nnx.Module):
    """Runs all of its stack in one call: nothing scans it."""

    def __init__(self):
        self.p, self.q = nnx.Param(jnp.zeros((3, 8, 8))), nnx.Param(jnp.zeros((8, 3, 8)))

    def __call__(self, x):
        return jnp.einsum("bi,sio->sbo", x, self.p[...])


class Sides(nnx.Module):
    """Multiplies two matrices with an input of two parts in one call, which no scan takes apart."""

    def __init__(self):
        kind = {"batch_axis": {0: 2}, "use_bias": False, "kernel_init": nnx.initializers.zeros}
        self.up = nnx.LinearGeneral(8, 8, **kind, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


def test_a_stack_that_runs_in_one_call_drops_too():
    model = get_peft_model(Sides(), CONFIG, rngs=nnx.Rngs(5))
    model.train()
    lam = model.model.up.randlora_lambda["default"]["kernel"]
    lam[...] = jnp.ones_like(lam[...])
    x = jnp.ones((2, 3, 8))
    assert not np.allclose(model(x), model(x))


class Mixed(nnx.Module):
    def __init__(self):
        self.experts = Experts()

    def __call__(self, x):
        return self.experts(x)


def test_kernels_of_a_module_stacked_along_different_axes_are_refused():
    views = {"experts/p": "s i o", "experts/q": "i s o"}
    config = RandLoraConfig(r=2, target_modules=["p"], randlora_dropout=0.5)
    with pytest.raises(ConfigError, match=r"randlora_dropout: .*'experts\.p', 'experts\.q'"):
        get_peft_model(Mixed(), config, views=views, rngs=nnx.Rngs(0))
