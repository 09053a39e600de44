"""Eight host devices: whatever a mesh cuts, nothing of the size of the bases is sent in a step.

Run by `test_mesh.py` in a process of its own, which has the eight devices. The blocks are a
Llama's, in bfloat16, scanned and rebuilt (``jax.checkpoint``): layers of several widths, each with
another corner of the bases.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import base, collectives

from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.bases import BasisPair, used_extents
from randlora_jax.core.contraction import LAST_AXES
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.layer_call import RunningLayer
from randlora_jax.core.mesh import Placement
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions

R, DEPTH, ROWS, LENGTH = 16, 2, 16, 56
MATRICES = {"key": (120, 40), "query": (120, 120), "up": (120, 360), "down": (360, 120)}
# mesh extents, how "up" and the like are cut, the axis that splits the tokens; "down" the other way
LAYOUTS = {
    "FSDP": ({"data": 8}, P("data", None), "data"),
    "tensor parallel": ({"model": 8}, P(None, "model"), None),
    "FSDP and tensor": ({"data": 4, "model": 2}, P("data", "model"), "data"),
}
# the bases and the factors made of them have these axes; else only what is in the middle of a
# factored layer has, and that has a length
N = {used_extents(matrix, R).n for matrix in MATRICES.values()}
FLAT = {n * R for n in N}


def of_bases(shape):
    return LENGTH not in shape and (bool(FLAT & {*shape}) or any((n, R) == shape[-2:] for n in N))


def compiled_step(name, axis_type, apply):
    """The gradient of a scan over blocks, compiled for shapes alone."""
    extents, cut, rows = LAYOUTS[name]
    explicit = axis_type == AxisType.Explicit
    mesh = jax.make_mesh(tuple(extents.values()), tuple(extents), (axis_type,) * len(extents))
    specs = {layer: P(*cut[::-1]) if layer == "down" else cut for layer in MATRICES}
    options = ExecutionOptions(apply, () if explicit or not rows else (rows,))

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def trained(matrix):
        _, n, smallest = used_extents(matrix, R)
        shapes = (DEPTH, R, n), (DEPTH, n, smallest)
        return [array(shape, jnp.float32) for shape in shapes]

    kernels = {
        layer: array((DEPTH, *matrix), jnp.bfloat16, None, *specs[layer])
        for layer, matrix in MATRICES.items()
    }
    pair = BasisPair(array((R, 120), jnp.bfloat16), array((360, max(N), R), jnp.bfloat16))
    x = array((ROWS, LENGTH, 120), jnp.bfloat16, rows)

    def layer(name, x, kernel, trained, pair):
        spec = specs[name]

        def run(kernel, x):
            flat = x.reshape(-1, x.shape[-1]) if explicit else x
            return base(kernel, flat, spec, rows, explicit).reshape(*x.shape[:-1], -1)

        placed = Kernel.traced(kernel, KernelLayout("io"), NamedSharding(mesh, spec))
        running = RunningLayer(name, run, [], placed, LAST_AXES, jnp.bfloat16)
        update = Update(*trained, pair, 0.1, MATRICES[name])
        return adapted(running, x, [Contribution(update)], options)

    @jax.checkpoint
    def block(x, kernels, trained, pair):
        def run(name, x):
            return layer(name, x, kernels[name], trained[name], pair)

        x = x + run("down", jnp.tanh(run("up", jnp.tanh(run("query", x)))))
        return x * jnp.tanh(run("key", x)).mean(-1, keepdims=True)

    def loss(trained, kernels, pair, x):
        step = lambda x, leaves: (block(x, *leaves, pair), None)  # noqa: E731
        return (jax.lax.scan(step, x, (kernels, trained))[0].astype(jnp.float32) ** 2).mean()

    with jax.set_mesh(mesh) if explicit else nullcontext():
        lowered = jax.jit(jax.grad(loss)).lower(
            {layer: trained(matrix) for layer, matrix in MATRICES.items()}, kernels, pair, x
        )
        return lowered.compile()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "name, apply", [*((name, "auto") for name in LAYOUTS), ("FSDP and tensor", "factored")]
)
def test_no_bases_are_sent(name, apply, axis_type):
    sent = collectives(compiled_step(name, axis_type, apply).as_text())
    assert sent
    assert not [(what, shape) for what, shape in sent if of_bases(shape)]


def test_bases_that_are_left_to_the_partitioner_are_seen(monkeypatch):
    """The check above can fail."""
    jax.clear_caches()
    monkeypatch.setattr(Placement, "sliced", lambda _, update: update.sliced())
    sent = collectives(compiled_step("FSDP and tensor", AxisType.Auto, "auto").as_text())
    jax.clear_caches()
    print("left to the partitioner:", sorted({s for s in sent if of_bases(s[1])}))
    assert any(of_bases(shape) for _, shape in sent)
