"""Eight host devices: rows with adapters of their own, split over them like any batch.

Run by `test_mesh.py` in a process of its own, which has the eight devices.
"""

import functools
from contextlib import nullcontext
from dataclasses import replace
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import collectives

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.core.rows import RowOrder

ROWS, WIDTH, INNER, R = 16, 64, 128, 16
TOKENS = {RowOrder.TOKENS: 1, RowOrder.FACTORS: 64, RowOrder.DELTA: 256}  # a row
CONFIG = RandLoraConfig(r=R, randlora_alpha=16, target_modules=["up", "down"])
NAMES = ["a", "b", "__base__", "c"] * (ROWS // 4)
# mesh extents, how the two kernels are cut
LAYOUTS = {
    "data parallel": ({"data": 8}, {"up": P(), "down": P()}),
    "FSDP": ({"data": 8}, {"up": P("data"), "down": P(None, "data")}),
    "tensor parallel": ({"model": 8}, {"up": P(None, "model"), "down": P("model")}),
    "FSDP and tensor": (
        {"data": 4, "model": 2},
        {"up": P("data", "model"), "down": P("model", "data")},
    ),
}


class Net(nnx.Module):
    """With explicit axes its author says where outputs lie."""

    def __init__(self, mesh=None, cuts=None, bias=False):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(WIDTH, INNER, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)
        self.out = None
        if bias and mesh:
            whole = NamedSharding(mesh, P())
            self.up.bias = nnx.Param(jax.device_put(self.up.bias[...], whole))
        for name, spec in (cuts or {}).items():
            placed = jax.device_put(getattr(self, name).kernel[...], NamedSharding(mesh, spec))
            getattr(self, name).kernel = nnx.Param(placed)
        if mesh and AxisType.Explicit in mesh.axis_types:
            data = "data" if "data" in mesh.shape else None
            inner = "model" if "model" in mesh.shape else None
            self.out = {"up": P(data, None, inner), "down": P(data, None, None)}

    def __call__(self, x):
        said = self.out or dict.fromkeys(["up", "down"])
        h = nnx.gelu(self.up(x, out_sharding=said["up"]))
        return x + self.down(h, out_sharding=said["down"])


def adapted(net, stacked=True, config=CONFIG, **more):
    model = get_peft_model(net, config, adapter_name="a", **more)
    for name in "bc":
        model.add_adapter(name, config)
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        state = nnx.state(model, nnx.LoRAParam)
        draw = np.random.default_rng(seed)
        moved = jax.tree.map(
            lambda x, draw=draw: jax.device_put(
                x + jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), x.sharding
            ),
            state,
        )
        nnx.update(model, moved)
    model.set_adapter("a")
    if stacked:
        model.stack_adapters(4)
    return model


def compiled(model, x, rows=None):
    """The program of a call, and its arrays."""
    graph, state = nnx.split(model)

    def run(state, x, rows):
        more = {} if rows is None else {"adapter_names": rows}
        return nnx.merge(graph, state)(x, **more)

    return jax.jit(run).lower(state, x, rows).compile(), (state, x, rows)


def inputs(order):
    return jax.random.normal(jax.random.key(3), (ROWS, TOKENS[order], WIDTH))


@pytest.fixture(scope="module")
def alone():
    """Outputs by row, those of the base model, and the operations, of one device; by order."""

    @functools.cache
    def run(order):
        model, x = adapted(Net()), inputs(order)
        program, arrays = compiled(model, x, model.rows(NAMES))
        made = np.asarray(program(*arrays)), np.asarray(Net()(x))
        return *made, program.cost_analysis()["flops"]

    return run


CASES = [
    (order, name)
    for name in LAYOUTS
    for order in RowOrder
    if order is RowOrder.TOKENS or name in ("data parallel", "FSDP and tensor")
]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("order", "name"), CASES)
def test_rows_split_over_devices(name, order, axis_type, alone):
    extents, cuts = LAYOUTS[name]
    explicit = axis_type == AxisType.Explicit
    mesh = jax.make_mesh(tuple(extents.values()), tuple(extents), (axis_type,) * len(extents))
    data = "data" if "data" in extents else None
    if explicit:  # an explicit kernel lies as its layer multiplies it
        cuts = {n: P(*(None if a == "data" else a for a in spec)) for n, spec in cuts.items()}
    more = {"token_axes": ["data"]} if data and not explicit else {}
    x = jax.device_put(inputs(order), NamedSharding(mesh, P(data)))
    expected, base, flops = alone(order)
    with jax.set_mesh(mesh) if explicit else nullcontext():
        model = adapted(Net(mesh, cuts), **more)
        rows = model.rows(NAMES)
        if order is RowOrder.FACTORS:  # slots are data, and may lie as the batch does
            rows = jax.device_put(rows, NamedSharding(mesh, P(data)))
        program, arrays = compiled(model, x, rows)
        found = np.asarray(program(*arrays))
        single = adapted(Net(mesh, cuts), stacked=False, apply="factored", **more)
        other, _ = compiled(single, x)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.abs(found - base)[2::4].max() <= 1e-6 * np.abs(base).max()
    assert np.abs(found - base)[0::4].max() >= 1e-2 * np.abs(base).max()
    sent, usual = collectives(program.as_text()), collectives(other.as_text())
    extra = [one for one in sent if one not in usual]
    share = program.cost_analysis()["flops"] / flops
    print(f"{name}, {order}, {axis_type.name}: {share:.3f}; {sent}; one adapter: {usual}")
    # lambda and gamma are picked for a device's own rows
    assert f"f32[{ROWS // extents.get('data', 1)},1,4,64]" in program.as_text()
    assert not data or f"f32[{ROWS},1,4,64]" not in program.as_text()
    # where a layer's input is cut each device widens its own share of x to all of the output, as
    # it does for one adapter; XLA counts a loop over rows as one round of it
    most = other.cost_analysis()["flops"] / flops if "model" in extents else 1 / 8
    assert order is RowOrder.DELTA or share <= 1.1 * most
    # beyond that, at most the slots of rows
    assert all(prod(shape) <= 2 * ROWS for _, shape in extra), (extra, usual)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_biases_of_rows_that_are_split(axis_type):
    """On automatic axes they follow the row; on explicit ones they cannot, and it is said."""
    config = replace(CONFIG, bias="randlora_only")
    x = inputs(RowOrder.TOKENS)
    expected = adapted(Net(bias=True), config=config)(x, adapter_names=NAMES)
    explicit = axis_type == AxisType.Explicit
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    more = {} if explicit else {"token_axes": ["data"]}
    with jax.set_mesh(mesh) if explicit else nullcontext():
        cuts = LAYOUTS["data parallel"][1]
        model = adapted(Net(mesh, cuts, bias=True), config=config, **more)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        if explicit:
            with pytest.raises(ConfigError, match=r"this Linear cannot .*automatic ones"):
                model(x, adapter_names=NAMES)
            return
        found = model(x, adapter_names=NAMES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def linen_adapted(bound, **more):
    config = replace(CONFIG, target_modules="all-linear")
    model = get_peft_model(bound, config, adapter_name="a", **more)
    for name in "bc":
        model.add_adapter(name, replace(CONFIG, target_modules="all-linear"))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        draw = np.random.default_rng(seed)
        trained, frozen = model.split()
        moved = jax.tree.map(lambda x, draw=draw: x + draw.normal(0, 0.1, x.shape), trained)
        model.variables = {**frozen, "randlora": jax.tree.map(jnp.float32, moved)}
    model.stack_adapters(4)
    return model


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_rows_of_a_linen_model(axis_type):
    net = nn.Sequential([nn.Dense(INNER, use_bias=False), nn.gelu, nn.Dense(WIDTH, use_bias=False)])
    x = inputs(RowOrder.TOKENS)
    variables = net.init(jax.random.key(0), x)
    expected = linen_adapted(net.bind(variables))(x, adapter_names=NAMES)
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    with jax.set_mesh(mesh) if axis_type == AxisType.Explicit else nullcontext():
        model = linen_adapted(net.bind(jax.device_put(variables, NamedSharding(mesh, P()))))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        apply = jax.jit(lambda variables, x, rows: model.apply(variables, x, adapter_names=rows))
        found = apply(model.variables, x, model.rows(NAMES))
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), found.ndim)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


class Heads(nn.Module):
    """Kernels of three axes, of which the middle one or the first is the heads'."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.DenseGeneral((8, 16), use_bias=False, name="split")(x))
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name="join")(h)


HEADS = {"split": (None, "model"), "join": ("model",)}
INSIDE = {"split": ("data", None, "model"), "join": (None, "model", "data")}


@pytest.mark.parametrize("cuts", [HEADS, INSIDE], ids=["heads", "inside heads"])
def test_rows_where_kernels_are_cut_along_an_inner_axis(cuts):
    net, x = Heads(), inputs(RowOrder.TOKENS)
    variables, told = net.init(jax.random.key(0), x), {"sample_inputs": (x,)}
    expected = linen_adapted(net.bind(variables), **told)(x, adapter_names=NAMES)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    placed = {
        name: {"kernel": jax.device_put(held["kernel"], NamedSharding(mesh, P(*cuts[name])))}
        for name, held in variables["params"].items()
    }
    told["token_axes"] = ["data"]
    model = linen_adapted(net.bind({"params": placed}), **told)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    apply = jax.jit(lambda variables, x, rows: model.apply(variables, x, adapter_names=rows))
    found = apply(model.variables, x, model.rows(NAMES))
    base = net.apply(variables, inputs(RowOrder.TOKENS))
    assert np.abs(found - base)[0].max() >= 1e-2 * np.abs(base).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
