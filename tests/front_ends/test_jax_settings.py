"""Settings of JAX under which a user's program, and so a wrapped model, may have to run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)
SPARSE = RandLoraConfig(
    r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False, sparse=True
)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
rows = pytest.mark.parametrize("rows", [2, 200])


def linear(size_in, size_out, dtype):
    return nnx.Sequential(
        nnx.Linear(size_in, size_out, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )


@rows
@dtypes
@pytest.mark.parametrize("sizes", [(16, 24), (24, 16)])
@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_ranks_are_nowhere_promoted(config, sizes, dtype, rows):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, sizes[0])), dtype)

    def loss(model, x):
        return (model(x).astype(jnp.float32) ** 2).sum()

    def everything():
        model = get_peft_model(linear(*sizes, dtype), config, rngs=nnx.Rngs(1))
        found = [model(x), model(x, adapter_names=["default", "__base__"] * (rows // 2))]
        found += jax.tree.leaves(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model, x))
        found += model.delta_weights().values()
        model.merge_adapter()
        return [*found, model(x)]

    expected = everything()
    with jax.numpy_rank_promotion("raise"):
        for a, b in zip(everything(), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_in_linen_either():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="out")(nn.relu(nn.Dense(12, name="up")(x)))

    x = jnp.ones((3, 8))
    with jax.numpy_rank_promotion("raise"):
        net = Net()
        bound = net.bind(net.init(jax.random.key(0), x))
        model = get_peft_model(bound, CONFIG, rngs=jax.random.key(1), sample_inputs=(x,))
        assert abs(model(x) - bound(x)).max() > 0.1
