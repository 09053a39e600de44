"""optax's ways to train, on the trained leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from mlp import TARGETS, X, linen_net, nnx_net, torch_net

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

CONFIG = RandLoraConfig(r=5, randlora_alpha=10, target_modules=TARGETS)


def wrapped(config=CONFIG, **more):
    return get_peft_model(linen_net(torch_net()), config, **more)


def parts(model):
    frozen = dict(model.variables)
    return frozen.pop("randlora"), frozen


def loss(model, trained, frozen, x):
    return (model.apply({**frozen, "randlora": trained}, x) ** 2).mean()


def moved(trained):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), trained)


def train(tx, steps, batches, gradient=None):
    """The leaves after some steps from a fixed start; the losses on the way."""
    model = wrapped()
    trained, frozen = parts(model)
    trained = moved(trained)
    state, losses = tx.init(trained), []
    for i in range(steps):
        x = batches[i % len(batches)]
        value, grads = jax.value_and_grad(lambda t, x=x: loss(model, t, frozen, x))(trained)
        grads = grads if gradient is None else jax.tree.map(gradient, grads)
        updates, state = tx.update(grads, state, trained)
        trained, losses = optax.apply_updates(trained, updates), [*losses, float(value)]
    return trained, losses


def named(tree):
    """The leaves by lambda and gamma."""
    found = {"randlora_lambda": [], "randlora_gamma": []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[next(k.key for k in path if k.key in found)].append(np.asarray(leaf))
    return found


def label(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "lambda" if "randlora_lambda" in jax.tree_util.keystr(path) else "gamma",
        tree,
    )


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(1e-2),
        optax.sgd(optax.warmup_cosine_decay_schedule(0, 1e-1, 3, 30), momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3)),
        optax.MultiSteps(optax.adam(1e-2), 2),
    ],
    ids=["adamw", "schedule", "clipped", "accumulated"],
)
def test_losses_fall(tx):
    _, losses = train(tx, 30, [X])
    assert losses[-1] < 0.7 * losses[0]


def test_multi_transform_trains_lambda_alone():
    kinds = {"lambda": optax.adam(1e-2), "gamma": optax.set_to_zero()}
    after, _ = train(optax.multi_transform(kinds, label), 3, [X])
    before = named(moved(parts(wrapped())[0]))
    for one, other in zip(before["randlora_gamma"], named(after)["randlora_gamma"], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before["randlora_lambda"], named(after)["randlora_lambda"], strict=True):
        assert (one != other).any()


def test_weight_decay_falls_on_what_it_should():
    mask = lambda tree: jax.tree.map(lambda kind: kind == "lambda", label(tree))  # noqa: E731
    tx = optax.chain(optax.masked(optax.add_decayed_weights(0.5), mask), optax.sgd(1.0))
    after, _ = train(tx, 1, [X], gradient=jnp.zeros_like)
    before = named(moved(parts(wrapped())[0]))
    for one, other in zip(before["randlora_gamma"], named(after)["randlora_gamma"], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before["randlora_lambda"], named(after)["randlora_lambda"], strict=True):
        np.testing.assert_allclose(other, 0.5 * one, rtol=1e-6)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    halves = [X[:3], X[3:]]
    accumulated, _ = train(optax.MultiSteps(optax.sgd(0.1), 2), 2, halves)
    whole, _ = train(optax.sgd(0.1), 1, [X])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), accumulated, whole)


@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_the_users_own_checkpointing_changes_no_gradient(apply):
    model = wrapped(apply=apply)
    trained, frozen = parts(model)
    trained = moved(trained)
    plain = jax.grad(lambda t: loss(model, t, frozen, X))(trained)
    around = jax.checkpoint(lambda t: loss(model, t, frozen, X))
    again = jax.grad(around)(trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, plain)


def test_a_bfloat16_base_keeps_float32_leaves():
    base = nnx_net(torch_net())
    nnx.update(base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(base, nnx.Param)))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(base, nnx.Param)))
    model = get_peft_model(base, CONFIG)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        f = lambda model: (model(jnp.asarray(X, jnp.bfloat16)).astype(jnp.float32) ** 2).mean()  # noqa: E731
        value, grads = nnx.value_and_grad(f, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, AdapterParam))} == {
        np.dtype(np.float32)
    }
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model.unload(), nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def go_on(model, state, tx, steps):
    """The leaves and the optimizer's state after some steps."""
    trained, frozen = parts(model)
    state = tx.init(trained) if state is None else state
    for _ in range(steps):
        grads = jax.grad(lambda t: loss(model, t, frozen, X))(trained)
        updates, state = tx.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    model.variables = {**frozen, "randlora": trained}
    return trained, state


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dropped"])
def test_training_goes_on_from_a_file(keep, tmp_path):
    """The file holds what trains to the bit; whether the optimizer's state stays is the user's."""
    tx, whole = optax.adamw(1e-2), wrapped()
    whole.variables = {**whole.variables, "randlora": moved(whole.variables["randlora"])}
    _, state = go_on(whole, None, tx, 5)
    whole.save_pretrained(tmp_path)
    expected, _ = go_on(whole, state if keep else None, tx, 5)
    again = RandLoraModel.from_pretrained(linen_net(torch_net()), tmp_path, is_trainable=True)
    found, _ = go_on(again, state if keep else None, tx, 5)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    other, _ = go_on(
        RandLoraModel.from_pretrained(linen_net(torch_net()), tmp_path, is_trainable=True),
        None if keep else state,
        tx,
        5,
    )
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), found, other)))
