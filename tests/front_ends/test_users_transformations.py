"""What users put around and into their models: checkpoint policies, explicit meshes, shard_map."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from randlora_jax.interop.errors import ConfigError

from randlora_jax import RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=2, target_modules=["a", "b"])
X = jax.random.normal(jax.random.key(0), (4, 8))
POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}
saving = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


class Net(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.Linear(12, 8, rngs=nnx.Rngs(1)))

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class Saving(nnx.Module):
    def __init__(self, policy):
        self.net, self.policy = Net(), policy

    def __call__(self, x):
        return nnx.remat(lambda net, x: net(x), policy=self.policy)(self.net, x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="b")(jnp.tanh(nn.Dense(12, name="a")(x)))


def drawn(tree):
    return jax.tree.map(lambda v: 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape), tree)


def wrapped(net):
    model = get_peft_model(net, CONFIG, rngs=nnx.Rngs(1))
    nnx.update(model, drawn(nnx.state(model, nnx.LoRAParam)))
    return model


def slopes(model, x=X):
    loss = lambda model, x: jnp.sin(model(x)).sum()  # noqa: E731
    grad = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
    return jax.tree.leaves(nnx.jit(grad)(model, x))


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(np.abs(b).max()), rtol=0)


@saving
def test_nnx_remat_with_a_policy_inside_the_model(policy):
    close(slopes(wrapped(Saving(policy))), slopes(wrapped(Net())))


@saving
def test_linen_remat_with_a_policy(policy):
    def found(block):
        model = get_peft_model(block.bind(Block().init(jax.random.key(0), X)), CONFIG)
        trained, frozen = model.split()
        loss = lambda t: jnp.sin(model.apply({**frozen, "randlora": t}, X)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(drawn(trained))

    close(found(nn.remat(Block, policy=policy)()), found(Block()))


def test_an_explicit_mesh_that_is_not_set():
    """Where the base model runs: its arrays say where they lie."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    net = Net()
    on_mesh = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    nnx.update(net, jax.tree.map(on_mesh(P()), nnx.state(net)))
    model, x, expected = wrapped(net), on_mesh(P("d"))(X), slopes(wrapped(Net()))
    close(slopes(model, x), expected)
    with jax.set_mesh(mesh):
        close(slopes(model, x), expected)


def test_what_needs_numbers_says_so_inside_a_trace(tmp_path):
    model = wrapped(Net())
    before = model(X)
    for name, act in {
        "merge_adapter": lambda m: m.merge_adapter(),
        "merge_and_unload": lambda m: m.merge_and_unload()(X),
        "save_pretrained": lambda m: m.save_pretrained(tmp_path),
        "delta_weights": lambda m: m.delta_weights(),
    }.items():
        with pytest.raises(ConfigError, match=rf"{name}.*: this model is being traced"):
            nnx.jit(act)(model)
    np.testing.assert_array_equal(model(X), before)
    assert not any(tmp_path.iterdir())


def test_many_wrapped_models_in_one_run_and_one_can_be_taken_out(tmp_path):
    """Wrapped inside nnx.vmap: of their life each method says what they are."""

    def one(key):
        return get_peft_model(Net(), replace(CONFIG, init_weights=False), rngs=nnx.Rngs(key))

    many = nnx.vmap(one)(jax.random.split(jax.random.key(0), 3))
    run = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    before, paths = run(many, X), [path for path, _ in nnx.to_flat_state(nnx.state(many))]
    for act in (
        lambda: many.add_adapter("more", CONFIG),
        many.merge_adapter,
        many.delta_weights,
        many.randlora_settings,
        lambda: many.save_pretrained(tmp_path / "not"),
    ):
        with pytest.raises(ConfigError, match=r"expected 2 axes .* nnx.vmap.* take one out"):
            act()
    assert list(many.peft_config) == ["default"]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(many))] == paths
    np.testing.assert_array_equal(run(many, X), before)
    taken = nnx.merge(nnx.graphdef(many), jax.tree.map(lambda x: x[1], nnx.state(many)))
    taken.merge_adapter()
    np.testing.assert_allclose(taken(X), before[1], rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_shard_of_a_kernel_is_refused():
    """As `jax.shard_map` hands one to a model that cuts its products by hand."""
    kernel_of_a = lambda path, _: {"a", "kernel"} <= {*path}  # noqa: E731
    graph, kernels, rest = nnx.split(wrapped(Net()), kernel_of_a, ...)
    shards = jax.tree.map(lambda x: x[:, :3], kernels)
    with pytest.raises(ConfigError, match=r"layer 'a'.*\(8, 3\), expected \(8, 12\).*shard_map"):
        nnx.merge(graph, shards, rest)(X)
