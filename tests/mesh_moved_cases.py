"""Eight host devices: a wrapped model that was moved to others is the model that it was.

Run by `test_mesh.py` in a process of its own, which has the eight devices.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)
X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
NAMES = ["default", "b", "__base__", "b"] * 2


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.head = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.up(x)))


def mesh(first, *sizes, axes=("data", "model"), axis_type=AxisType.Auto):
    devices = np.array(jax.devices()[first : first + np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, axes[: len(sizes)], axis_types=(axis_type,) * len(sizes))


def cut(mesh):
    """As tunix cuts a model anew that its cluster copies: the sharding of each leaf."""

    def of(x):
        axis = next((i for i, n in enumerate(x.shape) if n % mesh.devices.shape[0] == 0), None)
        split = x.ndim == 2 and axis is not None and min(x.shape) >= 8
        return NamedSharding(mesh, P(*[None] * axis, mesh.axis_names[0]) if split else P())

    return of


def on(model, where):
    """The model's copy there, as of tunix's cluster."""
    graph, state = nnx.split(model)
    shardings = jax.tree.map(cut(where), state) if isinstance(where, Mesh) else where
    return nnx.merge(graph, jax.device_put(state, shardings))


def trained(model):
    """Losses of a few steps."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=AdapterParam)
    mesh = model.randlora_bases[next(iter(model.randlora_bases))]["A"].sharding.mesh
    x = jax.device_put(X, NamedSharding(mesh, P("data" if "data" in mesh.axis_names else None)))

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        value, slopes = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, slopes)
        return value

    return [float(step(model, optimizer, x)) for _ in range(3)]


HERE = mesh(0, 4, 2)
THERE = {
    "the same mesh of them in another order": Mesh(HERE.devices[::-1], HERE.axis_names),
    "half of them": mesh(4, 2, 2),
    "one axis": mesh(2, 4),
    "another axis": mesh(2, 3, axes=("other",)),
    "explicit axes": mesh(0, 8, axis_type=AxisType.Explicit, axes=("other",)),
    "a mesh of one": mesh(5, 1),
}


def wrapped(where=HERE, **options):
    return get_peft_model(on(Net(), where), CONFIG, rngs=nnx.Rngs(1), **options)


@pytest.fixture(scope="module")
def expected():
    return np.asarray(wrapped()(X)), trained(wrapped(token_axes=["data"]))


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", THERE)
def test_it_runs_and_trains_there(to, expected):
    mesh = THERE[to]
    model = on(wrapped(token_axes=["data"]), mesh)
    close(model(X), expected[0])
    found = nnx.jit(lambda model, x: model(x))(model, X)
    close(found, expected[0])
    assert found.sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_allclose(trained(model), expected[1], rtol=1e-4)


@pytest.mark.parametrize("to", ["half of them", "another axis"])
def test_its_adapters_live_on_there(to, tmp_path, expected):
    mesh = THERE[to]
    model = on(wrapped(), mesh)
    model.merge_adapter()
    close(model(X), expected[0])
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, names={".*": r"\g<0>"})
    model.add_adapter("b", CONFIG, rngs=nnx.Rngs(2))
    model.set_adapter("b")
    losses = trained(model)
    assert losses[-1] < losses[0]
    model.set_adapter("default")
    close(model(X), expected[0])
    for _, x in nnx.to_flat_state(nnx.state(model)):
        assert x.sharding.device_set == set(mesh.devices.flat)


@pytest.mark.parametrize("to", ["half of them", "explicit axes"])
def test_it_is_unmerged_there_to_the_bit(to, recwarn):
    model = wrapped()
    before = np.asarray(model.model.up.base_layer.kernel[...])
    model.merge_adapter()
    there = on(model, THERE[to])
    recwarn.clear()
    there.unmerge_adapter()
    assert not recwarn.list
    kernel = there.model.up.base_layer.kernel[...]
    np.testing.assert_array_equal(kernel, before)
    assert kernel.sharding.device_set == set(THERE[to].devices.flat)


def test_each_row_has_its_own_there():
    model = wrapped()
    model.add_adapter("b", CONFIG, rngs=nnx.Rngs(2))
    expected = np.asarray(model(X, adapter_names=NAMES))
    there = on(model, THERE["half of them"])
    close(there(X, adapter_names=NAMES), expected)
    close(nnx.jit(lambda model, x: model(x, adapter_names=NAMES))(there, X), expected)
    model.stack_adapters(3)
    there = on(model, THERE["half of them"])
    there.set_rows(NAMES)
    close(nnx.jit(lambda model, x: model(x))(there, X), expected)


def test_one_device_without_a_mesh(expected):
    model = on(wrapped(), jax.devices()[3])
    close(model(X), expected[0])
    model.merge_adapter()
    close(model(X), expected[0])


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nn.relu(nn.Dense(32, name="up")(x)))


@pytest.mark.parametrize(("to", "capacity"), [("half of them", None), ("another axis", 3)])
def test_variables_of_linen(to, capacity):
    def put(tree, mesh):
        return jax.device_put(tree, jax.tree.map(cut(mesh), tree))

    variables = put(LinenNet().init(jax.random.key(0), X), HERE)
    model = get_peft_model(LinenNet().bind(variables), CONFIG, rngs=jax.random.key(1))
    if capacity:
        model.stack_adapters(capacity)
    expected, there = np.asarray(model(X)), put(model.variables, THERE[to])
    close(jax.jit(model.apply)(there, X), expected)
    close(model.apply(there, X), expected)
    model.variables = there
    close(model(X), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_kernels_that_each_device_has_whole_in_a_shard_map(axis_type, expected):
    where = mesh(0, 8, axis_type=axis_type)
    graph, state = nnx.split(wrapped(where))
    run = jax.shard_map(
        lambda state, x: nnx.merge(graph, state)(x),
        mesh=where,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    if axis_type == AxisType.Explicit:
        state = jax.device_put(state, NamedSharding(where, P()))
    close(jax.jit(run)(state, jax.device_put(X, NamedSharding(where, P("data")))), expected[0])
