"""Rows with adapters of their own in bfloat16, float16 and quantised models (nnx)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantised_nets import CONFIG, Net, X, quantised_linen, quantised_nnx

from randlora_jax import get_peft_model

HERE = replace(CONFIG, target_modules=["up", "down"])  # heads sees all rows in one
NAMES = ["b", "__base__", "a", "c", "b"]
ALONE = {row: name for row, name in enumerate(NAMES) if name != "__base__"}


def adapted(base, scale=0.1, **more):
    """`base` with three adapters of random numbers, the last of another rank."""
    model = get_peft_model(base, HERE, adapter_name="a", **more)
    model.add_adapter("b", HERE)
    model.add_adapter("c", replace(HERE, r=4))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        draw = np.random.default_rng(seed)
        moved = jax.tree.map(
            lambda x, draw=draw: x + jnp.asarray(draw.normal(0, scale, x.shape), x.dtype),
            nnx.state(model, nnx.LoRAParam),
        )
        nnx.update(model, moved)
    return model


def one_by_one(model, x):
    """What each adapter makes of all rows, and the base model's output."""
    found = {}
    for name in "abc":
        model.set_adapter(name)
        found[name] = np.asarray(model(x), np.float64)
    with model.disable_adapter():
        return found, model(x)


def in_dtype(dtype):
    """Outputs in float32: what a layer sums, before its rounding hides an adapter."""
    net = Net()
    for layer in (net.up, net.down, net.heads):
        layer.dtype = layer.param_dtype = dtype
    nnx.update(net, jax.tree.map(lambda x: x.astype(dtype), nnx.state(net)))
    return net


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind, tile", [("int8", None), ("int8", 32), ("nf4", 32)])
def test_rows_of_a_quantised_model(kind, tile, stacked):
    base = quantised_nnx(kind, tile)
    plain = base(X)
    model = adapted(base)
    alone, _ = one_by_one(model, X)
    if stacked:
        model.stack_adapters(4)
    found = model(X, adapter_names=NAMES)
    np.testing.assert_array_equal(found[1], plain[1])
    for row, name in ALONE.items():
        assert np.abs(alone[name][row] - plain[row]).max() > 0.1 * np.abs(plain[row]).max()
        wrong = np.abs(np.asarray(found[row]) - alone[name][row]).max()
        assert wrong <= 1e-6 * np.abs(alone[name]).max()


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("kind, tile", [("int8", None), ("nf4", 32)])
def test_rows_of_a_quantised_linen_model(kind, tile, stacked):
    base = quantised_linen(kind, tile)
    model, alone = get_peft_model(base, CONFIG, adapter_name="a", sample_inputs=(X,)), {}
    model.add_adapter("b", CONFIG)
    model.add_adapter("c", replace(CONFIG, r=4))
    for seed, name in enumerate("abc"):
        model.set_adapter(name)
        draw = np.random.default_rng(seed)
        trained, frozen = model.split()
        moved = jax.tree.map(
            lambda x, draw=draw: x + jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), trained
        )
        model.variables = {**frozen, "randlora": moved}
        alone[name] = np.asarray(model(X))
    if stacked:
        model.stack_adapters(4)
    found, plain = model(X, adapter_names=NAMES), base(X)
    np.testing.assert_array_equal(found[1], plain[1])
    for row, name in ALONE.items():
        assert np.abs(alone[name][row] - plain[row]).max() > 0.1 * np.abs(plain[row]).max()
        assert np.abs(found[row] - alone[name][row]).max() <= 1e-6 * np.abs(alone[name]).max()


def test_a_compiled_call_of_a_quantised_model():
    model = adapted(quantised_nnx("int8"))
    model.stack_adapters(4)
    with model.disable_adapter():
        plain = nnx.jit(lambda model, x: model(x))(model, X)
    traced = []

    @nnx.jit
    def run(model, x, rows):
        traced.append(rows)
        return model(x, adapter_names=rows)

    found, eager = run(model, X, model.rows(NAMES)), model(X, adapter_names=NAMES)
    np.testing.assert_array_equal(found[1], plain[1])
    assert np.abs(found - eager).max() <= 1e-6 * np.abs(eager).max()
    run(model, X, model.rows(["a"] * 5))
    assert len(traced) == 1


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale", [0.1, 1e-3])
def test_rows_of_a_16_bit_model(dtype, scale, stacked):
    """As far from float32 as the same adapters one by one, factored as rows are.

    Where there are more bases than the rank, as of "c", bfloat16 rounds gamma besides: 1.22 times.
    """
    x = X.astype(dtype)
    model = adapted(in_dtype(dtype), scale, apply="factored")
    wide = adapted(Net(), scale)
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model, nnx.Param)))
    alone, plain = one_by_one(model, x)
    exact, _ = one_by_one(wide, x.astype(jnp.float32))
    if stacked:
        model.stack_adapters(4)
    found = model(x, adapter_names=NAMES)
    assert found.dtype == plain.dtype == dtype
    np.testing.assert_array_equal(found[1], plain[1])
    rows = [*ALONE]
    wanted = np.stack([exact[ALONE[row]][row] for row in rows])
    one = np.stack([alone[ALONE[row]][row] for row in rows])
    mine = np.asarray(found, np.float64)[np.asarray(rows)]
    assert np.std(mine - wanted) <= 1.5 * np.std(one - wanted)
