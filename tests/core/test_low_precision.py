"""A layer that multiplies in 16 bits does so with its adapter, too, and loses nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.mlir import ir

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.rows import RowOrder, RowUpdates
from randlora_jax.core.update import Update

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from operand_types import TOKENS_PER_WIDTH, arrays, of_one_layer, operations, step

LOW = (jnp.bfloat16, jnp.float16)
IN, OUT, TOKENS, R = 256, 512, 1024, 24


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("apply", "most"), [("auto", 4.2), ("merged", 3.2), ("factored", 7.1)])
def test_no_product_of_a_bfloat16_layer_has_a_float32_operand(apply, most, platform):
    found = of_one_layer(apply, platform)
    # lambda's and gamma's own gradients are float32, and do not grow with the tokens
    assert set(found) == {"bf16", "f32"} and found["f32"] < 0.005 and sum(found.values()) <= most


@pytest.mark.parametrize("apply", ["auto", "merged", "factored"])
def test_nothing_as_large_as_activations_or_bases_is_copied_to_float32(apply):
    """B is (width, bases, r): with r 24 its flat form has a shape that nothing else has."""
    width = 256
    lowered = step(2, apply, "cuda", width, r=24)
    seen = [shape for kind, shape in arrays(lowered) if kind == "f32"]
    assert seen and max(map(np.prod, seen)) < TOKENS_PER_WIDTH * width**2
    assert not {(width, 264), (width, 11, 24)} & {*seen}


@pytest.mark.parametrize("apply", ["auto", "merged", "factored"])
def test_what_waits_for_a_layers_turn_backwards(apply):
    """Lambda, gamma and A, for the cotangent: on a TPU, deltas were formed when the step began.

    With a layer's input behind the barrier, it was kept beside what it was made of, with B, each
    layer had copies of its corners; without A, gradients as large as delta waited for the end.
    """
    width, r, n = 256, 24, 11
    lowered = step(2, apply, "tpu", width, r)
    held = [
        [tuple(ir.RankedTensorType(one.type).shape) for one in operation.operands]
        for operation in operations(lowered.compiler_ir())
        if operation.name == "stablehlo.optimization_barrier"
    ]
    cotangent = (TOKENS_PER_WIDTH * width, width)
    assert [sorted(shapes) for shapes in held] == 2 * [[(n, width), (r, n), (r, width), cotangent]]


def pair(dtype, update, apply="auto", seed=0):
    """A layer in `dtype` with an adapter of which delta is so much of W, and x; sums in float32."""
    layer = nnx.Linear(
        IN, OUT, use_bias=False, dtype=dtype, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
    )
    layer.kernel[...] = layer.kernel[...].astype(dtype).astype(jnp.float32)
    net = nnx.Sequential(layer)
    config = RandLoraConfig(r=R, randlora_alpha=2 * R, target_modules="all-linear")
    model = get_peft_model(net, config, apply=apply)
    draw = np.random.default_rng(seed)
    state = nnx.state(model, nnx.LoRAParam)
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), state)
    nnx.update(model, state)
    (delta,) = model.delta_weights().values()
    (lam,) = (x for path, x in nnx.to_flat_state(state) if "randlora_lambda" in path)
    lam[...] = lam[...] * update * jnp.std(layer.kernel[...]) / np.std(delta)
    nnx.update(model, state)
    x = jnp.asarray(draw.normal(size=(TOKENS, IN)), dtype)
    return model, layer, x


def exact(model, layer, x):
    """x @ delta in float64."""
    (delta,) = model.delta_weights().values()
    return np.asarray(x, np.float64) @ np.asarray(delta, np.float64).T


def arrived(found, wanted):
    """How much of an effect is there, and the error as a share of it."""
    slope = (found * wanted).sum() / (wanted**2).sum()
    return slope, (found - wanted).std() / wanted.std()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("apply", ["auto", "factored"])
@pytest.mark.parametrize("update", [1e-3, 1e-5])
def test_a_small_update_arrives(dtype, apply, update):
    model, layer, x = pair(dtype, update, apply)
    with model.disable_adapter():
        frozen = np.asarray(model(x), np.float64)
    slope, noise = arrived(np.asarray(model(x), np.float64) - frozen, exact(model, layer, x))
    # float32 sums of the layer's own output: what they round is the less, the larger the update
    assert slope == pytest.approx(1, abs=0.01) and noise < max(0.01, 3e-7 / update)


@pytest.mark.parametrize("held", LOW)
def test_a_small_update_arrives_where_a_float32_layer_holds_its_kernel_in_16_bits(held):
    """Output and the gradient of the input, by float32 sums with the kernel as it is held."""
    model, layer, x = pair(jnp.float32, 1e-3)
    layer.kernel.set_raw_value(layer.kernel[...].astype(held))
    with model.disable_adapter():
        frozen, backwards = jax.vjp(model, x)
    found, adapted = jax.vjp(model, x)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, OUT)), jnp.float32)
    (delta,) = model.delta_weights().values()
    for change, wanted in (
        (found - frozen, exact(model, layer, x)),
        (adapted(dy)[0] - backwards(dy)[0], np.asarray(dy, np.float64) @ delta),
    ):
        slope, noise = arrived(np.asarray(change, np.float64), wanted)
        assert slope == pytest.approx(1, abs=0.01) and noise < 0.01


def test_rounded_into_the_kernel_it_would_not():
    model, layer, x = pair(jnp.bfloat16, 1e-3, "merged")
    with model.disable_adapter():
        frozen = np.asarray(model(x), np.float64)
    slope, noise = arrived(np.asarray(model(x), np.float64) - frozen, exact(model, layer, x))
    assert slope < 0.9 and noise > 0.3


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
@pytest.mark.parametrize("update", [0.1, 1e-5, 0])
def test_gradients_are_those_of_float32(dtype, apply, update):
    """Of lambda, gamma and the input; to what the rounding of what goes in leaves open."""

    def gradients(model, x, weights):
        def loss(model, x):
            return (model(x).astype(jnp.float32) * weights).sum() / TOKENS

        moving = (nnx.DiffState(0, nnx.LoRAParam), 1)
        trained, inputs = nnx.grad(loss, argnums=moving)(model, x)
        return [*jax.tree.leaves(trained), inputs]

    model, _, x = pair(dtype, update, apply)
    wide, _, _ = pair(jnp.float32, update)
    nnx.update(wide, nnx.state(model, nnx.LoRAParam))
    nnx.update(wide, nnx.state(model, nnx.filterlib.PathContains("kernel")))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, OUT)), dtype)
    found = gradients(model, x, weights)
    wanted = gradients(wide, x.astype(jnp.float32), weights.astype(jnp.float32))
    for mine, right in zip(found, wanted, strict=True):
        apart = np.linalg.norm(np.asarray(mine, np.float32) - right)
        assert np.isfinite(apart) and apart <= 0.01 * np.linalg.norm(right)


def drawn(matrix, r=16, deviation=1e-3):
    """An update of a matrix, whose deltas deviate from zero by so much."""
    draw = np.random.default_rng(0)
    n = -(-min(matrix) // r)
    shapes = (r, n), (n, min(matrix)), (r, min(matrix)), (max(matrix), n, r)
    lam, gamma, a, b = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    update = Update(lam, gamma, BasisPair(a, b), 1.0, matrix)
    return replace(update, lam=lam * deviation / jnp.std(update.formed()))


def way_of(update, how):
    """x to x @ delta: factored, formed, or as a row of a batch has it, in an order."""
    if isinstance(how, RowOrder):
        rows = RowUpdates(
            update.lam[None, None], update.gamma[None, None], update.pair, update.matrix
        )
        return lambda x: rows.applied(x[None], how)[0]
    return lambda x: update.applied(x, factored=how == "factored")


WAYS = pytest.mark.parametrize("how", ["factored", "formed", *RowOrder])
MATRICES = pytest.mark.parametrize("matrix", [(1024, 64), (64, 1024), (256, 256)])


@WAYS
@MATRICES
@pytest.mark.parametrize("tokens", [2, 300])
@pytest.mark.parametrize("size", [1.0, 60_000.0])
def test_float16_holds_what_a_large_input_makes(how, matrix, tokens, size):
    """x @ B is as large as the norm of x, which float16 need not hold where it does hold x."""
    update = drawn(matrix)
    signs = np.random.default_rng(1).choice([-1, 1], (tokens, matrix[0]))
    x = jnp.asarray(size * signs, jnp.float16)
    wanted = np.asarray(x, np.float64) @ np.asarray(update.formed(), np.float64)
    found = np.asarray(way_of(update, how)(x), np.float64)
    assert np.abs(wanted).max() < 6e4
    assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


@WAYS
@MATRICES
def test_float16_holds_what_large_cotangents_make(how, matrix):
    """As a loss scaled for float16 has them: the gradients of lambda, gamma and x."""
    draw, update = np.random.default_rng(1), drawn(matrix, deviation=1e-4)
    x = jnp.asarray(draw.choice([-1e-3, 1e-3], (3, matrix[0])), jnp.float16)
    dy = jnp.asarray(1e4 * draw.normal(size=(3, matrix[1])), jnp.float16)

    def gradients(x, how):
        def run(lam, gamma, x):
            return way_of(replace(update, lam=lam, gamma=gamma), how)(x)

        y, back = jax.vjp(run, update.lam, update.gamma, x)
        return back(dy.astype(y.dtype))

    wanted = gradients(x.astype(jnp.float32), "formed")
    for mine, right in zip(gradients(x, how), wanted, strict=True):
        assert np.abs(right).max() < 6e4
        apart = np.linalg.norm(np.asarray(mine, np.float32) - right)
        assert apart < 2e-3 * np.linalg.norm(right)


@pytest.mark.parametrize("how", ["factored", "formed", RowOrder.FACTORS, RowOrder.DELTA])
@MATRICES
def test_no_product_with_float16_rows_has_a_float32_operand(how, matrix):
    tokens, update = 300, drawn(matrix)
    x = jnp.ones((tokens, matrix[0]), jnp.float16)

    def loss(lam, gamma, x):
        y = way_of(replace(update, lam=lam, gamma=gamma), how)(x)
        return y.astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(update.lam, update.gamma, x)
    products = [
        [ir.RankedTensorType(one.type) for one in operation.operands]
        for operation in operations(lowered.compiler_ir())
        if operation.name == "stablehlo.dot_general"
    ]
    of_rows = [types for types in products if any(tokens in one.shape for one in types)]
    assert of_rows and all(str(one.element_type) == "f16" for types in of_rows for one in types)


@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_a_float16_model_runs_where_its_base_does(apply):
    layer = nnx.Linear(1024, 64, dtype=jnp.float16, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    config = RandLoraConfig(r=16, target_modules="all-linear")
    x = jnp.asarray(1000 * np.random.default_rng(1).normal(size=(2, 1024)), jnp.float16)
    base = np.asarray(layer(x))
    model = get_peft_model(nnx.Sequential(layer), config, apply=apply)
    np.testing.assert_array_equal(model(x), base)
    assert np.isfinite(base).all()
