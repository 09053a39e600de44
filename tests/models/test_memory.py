"""model.memory() counts what is there, of arrays and of shapes alone."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.models.memory import Memory, memory

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["up"], modules_to_save=["norm"])


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(16, 24, param_dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.LayerNorm(24, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.up(x))


def test_of_arrays_and_of_shapes_alone():
    model = get_peft_model(Net(), CONFIG)
    found = model.memory()
    lam, gamma, whole = 4 * 4, 4 * 16, 2 * 24
    assert found.base == 2 * (16 * 24 + 24) + 4 * 2 * 24
    assert found.bases == 2 * (4 * 16 + 24 * 4 * 4)
    assert found.adapters == found.gradients == found.adamw / 2 == 4 * (lam + gamma + whole)
    assert found.total == sum(found)
    assert get_peft_model(nnx.eval_shape(Net), CONFIG).memory() == found
    model.add_adapter("other", CONFIG)
    more = model.memory()
    assert more.adapters == 2 * found.adapters and more.gradients == found.gradients
    assert str(more).splitlines()[-1].startswith("total ")


def test_a_small_model_is_shown_in_smaller_units():
    rows = str(Memory(5, 3 * 2**10 // 2, 2**20, 0, 0)).splitlines()
    shown = [row.split()[1:] for row in rows]
    units = [["5", "bytes"], ["1.5", "KiB"], ["1.0", "MiB"], ["0", "bytes"], ["0", "bytes"]]
    assert shown == [*units, ["1.0", "MiB"]]


def test_an_array_under_two_names_counts_once():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.head = nnx.Param(self.up.kernel.get_raw_value())

    assert get_peft_model(Tied(), CONFIG).memory() == get_peft_model(Net(), CONFIG).memory()
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert memory([shape, shape], [], [], []).base == 48


def test_it_is_of_one_device():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    kernel = jax.ShapeDtypeStruct(
        (64, 32), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", "model"))
    )
    int4 = jax.ShapeDtypeStruct((3, 3), jnp.int4)
    assert memory([kernel], [int4], [], []) == (64 * 32 * 2 // 8, 5, 0, 0, 0)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "bfloat16", "int8", "float32"])
def test_numbers_of_few_bits_count_with_them(dtype):
    """JAX's own nbytes has a byte for each of 4 bits; what a process holds has half a byte."""
    nbytes = 64 * 64 * {"int4": 0.5, "uint4": 0.5, "int8": 1, "bfloat16": 2, "float32": 4}[dtype]
    array = jnp.zeros((64, 64), dtype)
    assert memory([array], [], [], []).base == nbytes
    assert memory([jax.eval_shape(lambda: array)], [], [], []).base == nbytes
