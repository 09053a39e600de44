"""Eight host devices: merging makes of each kernel what lies on a device, and sends nothing.

Run by `test_mesh.py` in a process of its own, which has the eight devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import collectives

from randlora_jax import get_peft_model
from randlora_jax.core.bases import BasisIdentity, Extents, draw, used_extents
from randlora_jax.core.kernel import Kernel, merged
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.update import Update

R = 24  # n * r is no side of a kernel
PAIR = BasisIdentity("jax", 5, "dense", R), Extents(512, 16, 384)
# a kernel's layout and shape, and how it is cut
KERNELS = {
    "FSDP": ("io", (256, 384), P("data", None)),
    "FSDP, columns, wide": ("io", (128, 512), P(None, "data")),
    "FSDP, tall": ("io", (512, 128), P("data", None)),
    "tensor parallel": ("io", (256, 384), P(None, "model")),
    "FSDP and tensor": ("io", (384, 256), P("data", "model")),
    "over both axes": ("io", (256, 384), P(("data", "model"), None)),
    "replicated": ("io", (256, 384), P()),
    "stacked": ("sio", (3, 256, 128), P(None, "data", "model")),
    "stacked, cut along the stack": ("sio", (4, 256, 128), P("data")),
    "heads": ("ioo", (256, 16, 8), P("data", "model")),
    "within heads": ("ioo", (256, 16, 8), P("data", None, "model")),
    "keys and values": ("soio", (2, 16, 256, 8), P(None, "model", "data")),
}


WITHIN = {"stacked, cut along the stack", "within heads"}  # delta is left to the partitioner
CASES = {
    "auto": ((AxisType.Auto, AxisType.Auto), jnp.bfloat16),
    "explicit": ((AxisType.Explicit, AxisType.Explicit), jnp.float32),
    "of both kinds": ((AxisType.Explicit, AxisType.Auto), jnp.float32),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_updates_where_it_lies(name, case):
    (axes, shape, spec), (axis_types, dtype) = KERNELS[name], CASES[case]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types)
    layout, sharding = KernelLayout(axes), NamedSharding(mesh, spec)
    stack, *matrix = layout.sizes(shape)
    _, n, smallest = used_extents(tuple(matrix), R)
    keys = iter(jax.random.split(jax.random.key(0), 3))
    kernel = (jax.random.normal(next(keys), shape) / 16).astype(dtype)
    lam = 0.3 * jax.random.normal(next(keys), (*stack, R, n))
    gamma = 0.3 * jax.random.normal(next(keys), (*stack, n, smallest))

    def updates(lam, gamma, pair):
        return [Update(lam, gamma, pair, 0.1, tuple(matrix))]

    arrays = lam, gamma, draw(*PAIR)
    alone = np.asarray(merged(kernel, updates(*arrays), layout, None), np.float32)
    assert np.abs(alone - np.asarray(kernel, np.float32)).max() > 1e-2

    given = (
        jax.device_put(kernel, sharding),
        updates(*jax.device_put(arrays, NamedSharding(mesh, P()))),
    )
    compiled = merged.lower(*given, layout, sharding).compile()
    text, found = compiled.as_text(), compiled(*given)
    assert found.sharding.is_equivalent_to(sharding, kernel.ndim)
    assert not collectives(text)
    if name not in WITHIN and spec != P():  # no device forms all of delta
        whole = {f"f32[{','.join(map(str, sides))}]" for sides in (matrix, matrix[::-1], shape)}
        assert not [shape for shape in whole if shape in text]
    # the order of a sum may differ in the last bit of float32, which may round to another bfloat16
    found = np.asarray(found, np.float32)
    print(f"{name}, {case}: {(found != alone).sum()} of {found.size} numbers differ in a bit")
    assert np.abs(found - alone).max() <= (1e-6 if dtype == jnp.float32 else 2**-8) * 4
    assert (found != alone).mean() < (1 if dtype == jnp.float32 else 0.001)


def test_a_delta_that_is_left_to_the_partitioner_is_seen():
    """The check above can fail."""
    axes, shape, spec = KERNELS["over both axes"]
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    _, n, smallest = used_extents(shape, R)
    updates = [Update(jnp.ones((R, n)), jnp.ones((n, smallest)), draw(*PAIR), 0.1, shape)]
    given = (
        jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec)),
        jax.device_put(updates, NamedSharding(mesh, P())),
    )
    left = jax.jit(lambda array, updates: Kernel(array, KernelLayout(axes)).taking(updates))
    text = left.lower(*given).compile().as_text()
    assert collectives(text) or f"f32[{shape[0]},{shape[1]}]" in text


def test_quantised_kernels_become_floats_where_they_lie():
    from quantised_nets import CONFIG, X, quantised_nnx

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

    def put(x):
        cut = x.ndim > 1 and x.shape[0] % 8 == 0
        return jax.device_put(x, NamedSharding(mesh, P("data") if cut else P()))

    def merged_model(base):
        model = get_peft_model(base, CONFIG)
        draw = np.random.default_rng(1)
        leaf = lambda x: jax.device_put(draw.normal(0, 0.1, x.shape).astype(x.dtype), x.sharding)  # noqa: E731
        nnx.update(model, jax.tree.map(leaf, nnx.state(model, nnx.LoRAParam)))
        return model.merge_and_unload(dequantize=True)

    alone, placed = quantised_nnx("int8"), quantised_nnx("int8")
    nnx.update(placed, jax.tree.map(put, nnx.state(placed)))
    alone, placed = merged_model(alone), merged_model(placed)
    for name in ("up", "down", "heads"):
        kernel = getattr(placed, name).kernel[...]
        assert kernel.dtype == jnp.float32
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), kernel.ndim)
        np.testing.assert_allclose(kernel, getattr(alone, name).kernel[...], rtol=0, atol=1e-6)
    np.testing.assert_allclose(placed(X), alone(X), rtol=1e-4, atol=1e-4)
