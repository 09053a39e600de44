"""What an adapter multiplies in, where a layer's `dtype` names nothing that sums could be in."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_nets import CONFIG, wrapped

from randlora_jax import KernelLayout, LayerType, RandLoraConfig, get_peft_model
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.kernel import merged
from randlora_jax.core.update import Update

DRAW = np.random.default_rng(0)
X = jnp.asarray(DRAW.normal(size=(3, 6)), jnp.float32)
NUMBERS = DRAW.integers(-9, 9, (6, 8))


class Mine(nnx.Module):
    """A user's own layer: how its kernel is stored, and what it calls its dtype."""

    def __init__(self, stored, dtype):
        self.kernel, self.dtype = nnx.Param(jnp.asarray(NUMBERS, stored)), dtype

    def __call__(self, x):
        return x @ self.kernel[...].astype(x.dtype)


class LinenMine(nn.Module):
    stored: str
    dtype: object

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", lambda _: jnp.asarray(NUMBERS, self.stored))
        return x @ kernel.astype(x.dtype)


TYPE = LayerType(KernelLayout("i o"))
IN_FLOAT32 = [None, "float32", "int8", jnp.int8, jnp.float8_e4m3fn, "fp32", 8]


def shares(stored, dtype):
    """What adapters add in nnx and in linen, and what their deltas do."""
    net = nnx.Sequential(Mine(stored, dtype))
    model = get_peft_model(net, CONFIG, rngs=nnx.Rngs(1), layer_types={Mine: TYPE})
    linen = nn.Sequential([LinenMine(stored, dtype)])
    linen = wrapped(linen, X, sample_inputs=(X,), layer_types={LinenMine: TYPE})
    for out, of in ((model(X), model), (linen.apply(linen.variables, X), linen)):
        (delta,) = of.delta_weights().values()
        yield np.asarray(out - X @ NUMBERS), np.asarray(X @ delta.T)


@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("dtype", IN_FLOAT32)
def test_it_is_what_its_input_is_in(stored, dtype):
    for found, wanted in shares(stored, dtype):
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("float16"), "half"])
def test_a_floating_dtype_counts_however_it_is_written(dtype):
    for found, wanted in shares("int8", dtype):
        apart = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 1e-5 < apart < 1e-2


SMALL = RandLoraConfig(r=4, randlora_alpha=0.01, target_modules="all-linear", init_weights=False)


def share(model, x):
    """What the adapter adds, and what it should: x times delta."""
    whole = model(x)
    with model.disable_adapter():
        base = model(x)
    (delta,) = model.delta_weights().values()
    return np.asarray(whole, np.float64) - np.asarray(base, np.float64), x @ delta.T


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("kind", ["uint8", "int32", "bool"])
@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_inputs_of_integers_meet_delta_beside_the_layer(front_end, kind, rows):
    """It would drown in the rounding of W to 16 bits."""
    x = DRAW.integers(0, 2 if kind == "bool" else 4, (rows, 8)).astype(kind)
    held = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}
    if front_end == "nnx":
        base = nnx.Sequential(nnx.Linear(8, 6, **held, rngs=nnx.Rngs(0)))
    else:
        base = nn.Sequential([nn.Dense(6, **held)])
        base = base.bind(base.init(jax.random.key(0), jnp.asarray(x)))
    model = get_peft_model(base, SMALL, rngs=jax.random.key(1))
    found, expected = share(model, jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())
    found = model(jnp.asarray(x), adapter_names=["default"] * rows)
    np.testing.assert_allclose(found, model(jnp.asarray(x)), rtol=1e-5, atol=1e-5)


def test_adapter_dropout_of_integers():
    config = RandLoraConfig(r=4, randlora_dropout=0.5, target_modules="all-linear")
    base = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    x = jnp.ones((3, 8), jnp.uint8)
    plain = base(x)
    assert (get_peft_model(base, config, rngs=nnx.Rngs(1))(x) == plain).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("apply", ["merged", "factored"])
@pytest.mark.parametrize("sizes", [(32, 16), (16, 32)])
def test_a_layer_that_answers_in_float32_gets_a_share_in_float32(sizes, apply, dtype):
    wide = {"preferred_element_type": jnp.float32, "use_bias": False, "rngs": nnx.Rngs(0)}
    n_in, n_out = sizes
    base = nnx.Sequential(nnx.Linear(n_in, n_out, dtype=dtype, param_dtype=dtype, **wide))
    base.layers[0].kernel[...] = jnp.zeros((n_in, n_out), dtype)  # the share alone
    x = jnp.asarray(DRAW.normal(size=(400, n_in)), dtype)
    model = get_peft_model(base, CONFIG, rngs=nnx.Rngs(1), apply=apply)
    found = model(x)
    assert found.dtype == jnp.float32
    rounded = np.asarray(found.astype(dtype), np.float32)
    assert (np.asarray(found) != rounded).mean() > 0.9
    rows = model(x.reshape(4, 100, n_in), adapter_names=["default"] * 4)
    assert (np.asarray(rows) != np.asarray(rows.astype(dtype), np.float32)).mean() > 0.9


def lowered(front_end, precision, tokens):
    """The step of an adapted layer of a stated precision, and its model."""
    x, held = jnp.ones((tokens, 64)), {"precision": precision}
    if front_end == "nnx":
        base = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0), **held))
        graph, state = nnx.split(get_peft_model(base, CONFIG, rngs=nnx.Rngs(1)))
        run = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    else:
        base = nn.Sequential([nn.Dense(64, **held)])
        base = base.bind(base.init(jax.random.key(0), x))
        model = get_peft_model(base, CONFIG, rngs=jax.random.key(1))
        run, state = model.apply, model.variables
    step = jax.grad(jax.jit(lambda state, x: run(state, x).sum()), argnums=1)
    found = [jax.jit(f).lower(state, x).as_text() for f in (run, step)]
    return set(re.findall(r"dot_general.*?precision = \[([^\]]*)\]", "".join(found)))


@pytest.mark.parametrize("tokens", [8, 2000])
@pytest.mark.parametrize("front_end", ["nnx", "linen"])
def test_an_adapter_multiplies_as_precisely_as_its_layer(front_end, tokens):
    for precision in ("high", jax.lax.Precision.HIGH, (jax.lax.Precision.HIGH,) * 2):
        assert lowered(front_end, precision, tokens) == {"HIGH, HIGH"}
    assert lowered(front_end, None, tokens) == {"HIGHEST, HIGHEST"}  # as for all tests


def test_what_is_made_once_is_made_precisely():
    update = Update(
        jnp.ones((4, 2)),
        jnp.ones((2, 6)),
        BasisPair(*map(jnp.ones, ((4, 6), (8, 2, 4)))),
        1.0,
        (8, 6),
    )
    text = merged.lower(jnp.ones((8, 6)), [update], KernelLayout("io"), None).as_text()
    assert re.findall(r"dot_general.*?precision = \[([^\]]*)\]", text) == ["HIGHEST, HIGHEST"]
