"""What an adapter multiplies in, where a layer's `dtype` names nothing that sums could be in."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_nets import CONFIG, wrapped

from randlora_jax import KernelLayout, LayerType, get_peft_model

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
