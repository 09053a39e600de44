"""Eight host devices: what is read out of partitioned programs is what was put into them.

Run by `training/test_scale.py` in a process of its own, which has the eight devices.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from partitioned import Program, Sent
from scale import METHODS, of_layers
from scale_step import APPLY, Job, llama3, step

assert len(jax.devices()) == 8
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of qwix and tunix
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
ROWS, WIDTH = 64, 16


def program(function, *specs, out=None, shape=(ROWS, WIDTH)):
    """Of a function of float32 arrays that lie as `specs` say."""
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, s)) for s in specs
    ]
    to = None if out is None else NamedSharding(MESH, out)
    return Program(jax.jit(function, out_shardings=to).lower(*given).compile().as_text())


def mapped(function, out):
    """It is run on each device's part of rows that the first axis cuts."""
    return jax.shard_map(function, mesh=MESH, in_specs=P("fsdp"), out_specs=out, check_vma=False)


WHOLE = 4 * ROWS * WIDTH  # bytes
KNOWN = {
    "all-gather": (partial(jax.lax.all_gather, axis_name="fsdp", tiled=True), P(), 3 / 4 * WHOLE),
    "all-reduce": (partial(jax.lax.psum, axis_name="fsdp"), P(), 2 * 3 / 4 * WHOLE / 4),
    "reduce-scatter": (
        partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True),
        P("fsdp"),
        3 / 4 * WHOLE / 4,
    ),
    "collective-permute": (
        partial(jax.lax.ppermute, axis_name="fsdp", perm=[(i, (i + 1) % 4) for i in range(4)]),
        P("fsdp"),
        WHOLE / 4,
    ),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_what_is_sent(kind):
    function, out, nbytes = KNOWN[kind]
    assert program(mapped(function, out), P("fsdp")).sent == {kind: Sent(1, nbytes)}


def test_what_the_partitioner_adds_is_seen_and_nothing_else():
    gathered = program(lambda x: x * 2, P("fsdp", "tp"), out=P(None, "tp"))
    assert gathered.sent == {"all-gather": Sent(1, 3 / 4 * WHOLE / 2)}
    assert program(lambda x: x * 2, P("fsdp", "tp")).sent == {}


def test_a_loop_sends_at_each_turn():
    def turns(x):
        step = lambda x, _: (jax.lax.psum(x, "fsdp") / 4, None)  # noqa: E731
        return jax.lax.scan(step, x, length=5)[0]

    assert program(mapped(turns, P("fsdp")), P("fsdp")).sent["all-reduce"].count == 5


def test_products_of_one_device_by_their_types():
    def both(x, y):
        low = x.astype(jnp.int8).T @ y.astype(jnp.int8)
        return x @ y.T, low

    found = program(both, P("fsdp"), P()).products
    assert found["f32"] == 2 * ROWS * ROWS * WIDTH / 4
    assert sum(found.values()) == 2 * (ROWS * ROWS * WIDTH + ROWS * WIDTH * WIDTH) / 4


TINY = llama3.ModelConfig(
    num_layers=1,
    vocab_size=64,
    embed_dim=128,
    hidden_dim=256,
    num_heads=8,
    head_dim=16,
    num_kv_heads=4,
    rope_theta=500_000,
    norm_eps=1e-5,
)
JOB = Job(TINY, "", lora_rank=4, documents=8, length=16)


def of_depth(layers):
    """The job with so many layers."""
    return replace(JOB, shape=replace(TINY, num_layers=layers))


def on_one(tree):
    """Bytes of a tree of shapes, on one device."""
    parts = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    return sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in parts)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_a_step_is_given(method):
    _, arguments, told = step(MESH, of_depth(2), method)
    trained, moments, rest, *batch = arguments
    whole = sum(x.size for x in jax.tree.leaves(trained))
    assert told["trained"] == whole
    assert on_one(batch) == JOB.documents // 4 * JOB.length * (4 + 4 + JOB.length)
    assert on_one(moments) == 2 * on_one(trained) + 4  # and a count of steps
    if method == "full":
        norms = 5 * 128  # cut over tp alone; all else over both
        assert not on_one(rest) and on_one(trained) == 2 * ((whole - norms) / 8 + norms / 2)
    if method in APPLY:
        assert told["memory adapters"] == told["memory gradients"] == on_one(trained) == 4 * whole
        assert told["memory adamw"] == on_one(moments) - 4
        assert told["memory base"] + told["memory bases"] == on_one(rest)


def figures(method, layers):
    """Of a tiny model's compiled step."""
    jitted, arguments, told = step(MESH, of_depth(layers), method)
    read = Program(jitted.lower(*arguments).compile().as_text())
    return {
        **told,
        **{f"{types} FLOP": count for types, count in read.products.items()},
        **{f"{kind} bytes": sent.nbytes for kind, sent in read.sent.items()},
    }


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_layers_add_up(method):
    one, two, three = (figures(method, layers) for layers in (1, 2, 3))
    expected = of_layers(one, two, 3)
    assert one["trained"] < two["trained"] and one["f32 FLOP"] < two["f32 FLOP"]
    for name in three:
        assert expected[name] == pytest.approx(three[name], rel=1e-2), name
