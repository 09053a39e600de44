"""No float32 copy of a whole pair of bases, in host memory or on a device, whatever is done."""

import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.torch_rng import Generation, torch_bases

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.core.bases import BasisIdentity, _draw, prng_key
from randlora_jax.models import basis_source

R, N_IN, N_OUT = 16, 1000, 2048
EXTENTS = basis_source.pair_extents([(N_IN, N_OUT)], R)
NUMBERS = EXTENTS.max * EXTENTS.n * R  # of B: A is a thousandth of it
KINDS = {"dense": {}, "sparse": {"sparse": True}}


class Net(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(N_IN, N_OUT, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


def config(**more):
    return RandLoraConfig(r=R, randlora_alpha=16, target_modules=["up"], **more)


def peak(function, *args):
    """NumPy's bytes at the worst moment, for each number of B; and what came."""
    tracemalloc.start()
    try:
        found = function(*args)
        return tracemalloc.get_traced_memory()[1] / NUMBERS, found
    finally:
        tracemalloc.stop()


def test_a_float32_copy_would_be_seen():
    x = np.zeros((EXTENTS.max, EXTENTS.n, R), np.float16)
    assert peak(lambda: x.astype(np.float32))[0] > 3.9


@pytest.mark.parametrize("kind", KINDS)
def test_drawing(kind):
    identity = BasisIdentity.drawn(3, kind, R, EXTENTS.min)
    draw = jax.jit(_draw, static_argnums=(1, 2, 3, 4))
    compiled = draw.lower(prng_key(3), kind, R, identity.sparsity, EXTENTS).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < NUMBERS
    used, (_, b) = peak(basis_source.stored_pair, identity, EXTENTS, {})
    assert used < 2.5 and b.shape == (EXTENTS.max, EXTENTS.n, R) and b.itemsize == 2


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_opening_again(kind, tmp_path):
    model = get_peft_model(Net(), config(**KINDS[kind]))
    assert peak(model.save_pretrained, tmp_path)[0] < 3.5
    # the file's pair, the pair drawn again, both in 16 bits, and where they agree
    assert peak(RandLoraModel.from_pretrained, Net(), tmp_path)[0] < 5.5


def of_file(bases, **more):
    """What a model keeps of the pair of a file that holds `bases`."""
    adapter = Adapter(config(**more), {}, bases=bases)
    _, kept, _ = basis_source.of_adapter(
        adapter, EXTENTS, {np.dtype(np.float32)}, None, None, "here"
    )
    return kept


def test_promoting_what_a_file_holds_in_float32():
    drawn = torch_bases(
        0, R, EXTENTS.min, EXTENTS.max, generation=Generation.BF16_24BIT, base_dtype=np.float32
    )
    wide = tuple(x.astype(np.float32) for x in drawn)
    used, kept = peak(of_file, wide)
    ((_, pair),) = kept.items()
    assert used < 3.5 and all(x.itemsize == 2 for x in pair)
    own = wide[0] + 1, wide[1]  # nobody's draw; A is float32 in earnest
    assert peak(of_file, own)[0] < 3.5


def test_ternary_pairs_of_files_become_integers():
    pair = torch_bases(0, R, EXTENTS.min, EXTENTS.max, kind="sparse")
    used, ((_, b), unit) = peak(basis_source.integers, pair)
    assert used < 2.5 and b.dtype == np.int8
    np.testing.assert_array_equal(b, np.sign(pair[1]))
    assert unit == float(np.abs(pair[0]).max()) * float(np.abs(pair[1]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_bfloat16(kind):
    """What is formed of B stays in the layer's 16 bits; of few tokens and of many."""
    model = get_peft_model(Net(), config(**KINDS[kind]))
    graph, trained, rest = nnx.split(model, AdapterParam, ...)

    def loss(trained, rest, x):
        return (nnx.merge(graph, trained, rest)(x).astype(jnp.float32) ** 2).mean()

    for tokens in (8, 4096):
        x = jnp.zeros((tokens, N_IN), jnp.bfloat16)
        text = jax.jit(jax.grad(loss)).lower(trained, rest, x).as_text()
        flat = EXTENTS.n * R
        shapes = {f"{N_OUT}x{EXTENTS.n}x{R}", f"{N_OUT}x{flat}", f"{flat}x{N_OUT}"}
        found = set(re.findall(rf"tensor<({'|'.join(shapes)})x(\w+)>", text))
        assert {dtype for _, dtype in found} - {"i8"} == {"bf16"}, found
