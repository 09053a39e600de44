"""Transformations inside an nnx model that outlive its calls, as those of a class's methods do.

What they traced for one call they run in every later call of equal arguments, of whatever model.
"""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=2, target_modules=["up", "down"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)


def scanned(call):
    steps = nnx.scan(call, in_axes=(None, 0), out_axes=0)
    return lambda self, x: steps(self, x[None])[0]


TRANSFORMED = {
    "nnx.jit": nnx.jit,
    "nnx.remat": nnx.remat,
    "nnx.scan": scanned,
    "jax.jit": jax.jit,
    "jax.checkpoint": jax.checkpoint,
}
every = pytest.mark.parametrize("transform", TRANSFORMED.values(), ids=TRANSFORMED)
PLAIN = lambda call: call  # noqa: E731


def net_class(transform, traced=None, *, of_method=True):
    """A class of models whose block runs under `transform`, made once for all of its models.

    Args:
      traced: takes down each trace of the block.
      of_method: the block's method is decorated; else a function that is given the block.
    """

    def call(self, x):
        if traced is not None:
            traced.append(type(x).__name__)
        return self.down(nnx.relu(self.up(x)))

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 8, rngs=rngs)
            self.down = nnx.Linear(8, 3, rngs=rngs)

        __call__ = transform(call) if of_method else call

    run = transform(lambda block, x: block(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Block(rngs)

        def __call__(self, x):
            return self.block(x) if of_method else run(self.block, x)

    return Net


def with_two(net):
    """A wrapped model of a class with two adapters, "default" and "second", that do something."""
    model = get_peft_model(net(nnx.Rngs(0)), CONFIG)
    for seed, name in enumerate(("default", "second")):
        if name == "second":
            model.add_adapter(name, CONFIG)
        model.set_adapter(name)
        noise, state = np.random.default_rng(seed), nnx.state(model, AdapterParam)
        moved = jax.tree.map(lambda x, g=noise: x + g.normal(0, 0.3, x.shape).astype("f"), state)
        nnx.update(model, moved)
    model.set_adapter("default")
    return model


@pytest.fixture(scope="module")
def expected():
    """What the two adapters give in a model without transformations."""
    model = with_two(net_class(PLAIN))
    found = {"default": np.asarray(model(X))}
    model.set_adapter("second")
    found["second"] = np.asarray(model(X))
    assert np.abs(found["default"] - found["second"]).max() > 1
    return found


def assert_same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@every
def test_rows_take_the_adapters_of_their_own_call(transform, expected):
    model = with_two(net_class(transform))
    for name in ("default", "second", "default"):
        assert_same(model(X, adapter_names=[name] * 4), expected[name])
        model.set_adapter(name)
        assert_same(model(X), expected[name])


@every
def test_the_active_adapter_of_a_stack_is_the_one_that_runs(transform, expected):
    model = with_two(net_class(transform))
    model.stack_adapters()
    for name in ("default", "second"):
        model.set_adapter(name)
        assert_same(model(X), expected[name])
    mixed = model(X, adapter_names=["second", "default", "default", "second"])
    assert_same(mixed[1:3], expected["default"][1:3])
    assert_same(mixed[::3], expected["second"][::3])


@every
def test_two_calls_in_one_program_have_their_own_rows(transform, expected):
    model = with_two(net_class(transform))
    model.stack_adapters()
    both = nnx.jit(lambda m, x, r, s: (m(x, adapter_names=r), m(x, adapter_names=s)))
    names = ("default", "second")
    outs = both(model, X, *(model.rows([name] * 4) for name in names))
    for name, out in zip(names, outs, strict=True):
        assert_same(out, expected[name])


@every
@pytest.mark.parametrize("of_method", [True, False])
def test_a_step_and_then_an_evaluation(transform, of_method, expected):
    """Two programs with the same block, and then a call outside of any."""
    outs = []
    for around in (PLAIN, transform):
        model = with_two(net_class(around, of_method=of_method))
        loss = lambda m, x: (m(x) ** 2).mean()  # noqa: E731
        step = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam)))
        grads = step(model, X)
        assert_same(nnx.jit(lambda m, x: m(x))(model, X), expected["default"])
        assert_same(model(X), expected["default"])
        outs.append(jax.tree.leaves(grads))
    for ours, plain in zip(*outs, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max())


@every
def test_a_second_model_of_a_class_is_reached_and_has_its_own_bases(transform):
    net = net_class(transform)
    for seed in range(2):
        model = with_two(net)
        bases = model.randlora_bases
        for pair in bases.values():
            pair["A"].set_value(pair["A"][...] * (1 + seed))
        plain = with_two(net_class(PLAIN))
        nnx.update(plain, nnx.state(model))
        assert_same(model(X), plain(X))


@every
def test_bases_that_change_are_those_of_the_next_call(transform):
    model, plain = with_two(net_class(transform)), with_two(net_class(PLAIN))
    for factor in (1, 2, 3):
        for pair in model.randlora_bases.values():
            pair["B"].set_value(pair["B"][...] * factor)
        nnx.update(plain, nnx.state(model))
        assert_same(model(X), plain(X))


@every
def test_a_call_between_steps_is_traced_once(transform):
    """Though a step under nnx.jit hands back the bases as other arrays."""
    traced, found = [], []
    model = with_two(net_class(transform, traced))
    for _ in range(3):
        model(X)
        found.append(len(traced))
        for pair in model.randlora_bases.values():
            for held in pair.values():
                held.set_value(jnp.copy(held[...]))
    assert found[0] == found[2] > 0


@every
def test_calls_that_are_equal_share_a_trace(transform, expected):
    traced = []
    model = with_two(net_class(transform, traced))

    def run(count):
        for name in ("default", "second") * count:
            model.set_adapter(name)
            assert_same(model(X), expected[name])
            with model.disable_adapter():
                model(X)
            model(X, adapter_names=["default", "second"] * 2)
            model(X, adapter_names=[name] * 4)

    run(1)
    before = len(traced)
    run(2)
    assert len(traced) == before > 0


def test_an_equal_model_in_a_program_traces_neither_it_nor_its_block():
    traced = []
    net, programs = net_class(nnx.jit, traced), []

    @nnx.jit
    def run(model, x):
        programs.append(model)
        return model(x)

    for _ in range(3):
        run(with_two(net), X)
    assert len(programs) == len(traced) == 1


@every
def test_what_is_traced_in_a_program_keeps_no_bases_alive(transform):
    net = net_class(transform)
    model = with_two(net)
    held = [weakref.ref(x) for x in jax.tree.leaves(nnx.state(model))]
    nnx.jit(lambda m, x: m(x))(model, X)
    del model
    gc.collect()
    assert len(held) == 14 and not any(x() is not None for x in held)
