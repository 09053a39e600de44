"""Eight host devices: the same numbers on any mesh, an eighth of the work, no surprise on the wire.

Run by `test_mesh.py` in a process of its own, which has the eight devices.
"""

import re
from contextlib import nullcontext
from functools import partial
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.bases import BasisIdentity, BasisPair, Extents, _draw, draw, prng_key
from randlora_jax.core.contraction import LAST_AXES, Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.layer_call import RunningLayer
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.front_ends.nnx.variables import SharedBasis

assert len(jax.devices()) == 8

WIDTH, TOKENS, R, DEPTH = 256, 4096, 32, 2
N = WIDTH // R
# mesh extents, how two layers' kernels are cut, the axis that splits the tokens
LAYOUTS = {
    "data parallel": ({"data": 8}, [P(), P()], "data"),
    "FSDP, rows": ({"data": 8}, [P("data", None)] * 2, "data"),
    "FSDP, columns": ({"data": 8}, [P(None, "data")] * 2, "data"),
    "tensor parallel": ({"model": 8}, [P(None, "model"), P("model", None)], None),
    "FSDP and tensor": (
        {"data": 4, "model": 2},
        [P("data", "model"), P("model", "data")],
        "data",
    ),
    "data and tensor": ({"data": 4, "model": 2}, [P(None, "model"), P("model", None)], "data"),
}
SMALL = {("all-reduce", "small"), ("all-gather", "small")}
GATHERED = {("all-gather", "kernel"), ("reduce-scatter", "kernel")}
EXPECTED = {
    "data parallel": SMALL,
    "FSDP, rows": SMALL | GATHERED,
    "FSDP, columns": SMALL | GATHERED,
    "tensor parallel": SMALL | {("all-reduce", "activation")},
    "FSDP and tensor": SMALL | GATHERED | {("all-reduce", "activation")},
    "data and tensor": SMALL | {("all-reduce", "activation")},
}


def collectives(text):
    """(operation, shape) of everything that is sent, in compiled HLO."""
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for line in text.splitlines():
        hit = re.search(rf"= (.*?) ({names})(-start)?\(", line)
        if hit:
            shapes = re.findall(r"\w+\[([\d,]*)\]", hit[1])
            found += [(hit[2], tuple(map(int, filter(None, s.split(","))))) for s in shapes]
    return found


def kind(shape, tokens):
    if tokens in shape:
        return "activation"
    return "small" if prod(shape) <= WIDTH * N else "kernel"


def base(kernel, x, spec, rows, explicit):
    """The layer itself; with explicit axes its author says what to gather."""
    if not explicit:
        return x @ kernel
    kept = P(*(None if axis == rows else axis for axis in spec))
    kernel = jax.sharding.reshard(kernel, kept)
    columns = kept[1] if len(kept) > 1 else None
    return jnp.matmul(x, kernel, out_sharding=P(rows, columns))


def stack(trained, kernels, pair, x, options, shardings, rows, explicit=False):
    for kernel, lam_gamma, sharding in zip(kernels, trained, shardings, strict=True):
        spec = sharding.spec if sharding else P()
        run = lambda k, x, spec=spec: base(k, x, spec, rows, explicit)  # noqa: E731
        placed = Kernel.traced(kernel, KernelLayout("io"), sharding)
        layer = RunningLayer("here", run, [], placed, LAST_AXES, jnp.float32)
        update = Update(*lam_gamma, pair, 0.1, kernel.shape)
        x = jnp.tanh(adapted(layer, x, [Contribution(update)], options))
    return (x**2).mean()


@pytest.fixture(scope="module")
def arrays():
    keys = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    trained = [(0.3 * draw(R, N), 0.3 * draw(N, WIDTH)) for _ in range(DEPTH)]
    kernels = [draw(WIDTH, WIDTH) / 16 for _ in range(DEPTH)]
    pair = BasisPair(draw(R, WIDTH).astype(jnp.bfloat16), draw(WIDTH, N, R).astype(jnp.bfloat16))
    return trained, kernels, pair, draw(TOKENS, WIDTH)


@pytest.fixture(scope="module")
def alone(arrays):
    """Gradients and FLOPs of one device."""

    def run(apply):
        gradient = jax.grad(
            lambda trained, *rest: stack(
                trained, *rest, ExecutionOptions(apply), [None] * DEPTH, None
            )
        )
        compiled = jax.jit(gradient).lower(*arrays).compile()
        return compiled(*arrays), compiled.cost_analysis()["flops"]

    return {apply: run(apply) for apply in ("auto", "factored")}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("apply", ["auto", "factored"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, apply, axis_type, arrays, alone):
    extents, specs, rows = LAYOUTS[name]
    explicit = axis_type == AxisType.Explicit
    mesh = jax.make_mesh(tuple(extents.values()), tuple(extents), (axis_type,) * len(extents))
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    options = ExecutionOptions(apply, () if explicit or not rows else (rows,))
    trained, kernels, pair, x = arrays
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    placed = (
        put(trained, P()),
        [jax.device_put(k, s) for k, s in zip(kernels, shardings, strict=True)],
        put(pair, P()),
        put(x, P(rows, None)),
    )

    def loss(trained, kernels, pair, x):
        return stack(trained, kernels, pair, x, options, shardings, rows, explicit)

    with jax.set_mesh(mesh) if explicit else nullcontext():
        compiled = jax.jit(jax.grad(loss)).lower(*placed).compile()
        found = compiled(*placed)
    expected, flops = alone[apply]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()

    sent = collectives(compiled.as_text())
    tokens = TOKENS // (extents[rows] if rows else 1)
    kinds = {(operation, kind(shape, tokens)) for operation, shape in sent}
    share = compiled.cost_analysis()["flops"] / flops
    print(f"{name}, {apply}, {axis_type.name}: {share:.4f} of one device's FLOPs; {sorted(kinds)}")
    assert kinds <= EXPECTED[name], sent
    if apply == "auto" and name != "data parallel" and name != "data and tensor":
        # Lowered, the second layer's delta is formed once for each pass. The CPU's compiler notices
        # where one device does it, and does it once; on a mesh only in some of the layouts.
        twice = 2 * WIDTH**3 / flops
        assert -0.03 <= share * 8 - 1 <= 0.03 + twice
    if name == "data parallel":
        # the trained in T are shared, those in width cubed are not: each device forms delta itself
        cubed = 6 * WIDTH / (6 * TOKENS + 6 * WIDTH) if apply == "auto" else 0
        assert share <= (1 - cubed) / 8 + cubed + 0.01


def test_what_is_left_to_the_partitioner_is_seen(arrays):
    """Without a word on the tokens, delta's whole gradient is summed: the check above can fail."""
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    shardings = [NamedSharding(mesh, P())] * DEPTH
    trained, kernels, pair, x = arrays
    placed = (*jax.device_put((trained, kernels, pair), shardings[0]),)
    x = jax.device_put(x, NamedSharding(mesh, P("data", None)))

    def loss(trained, kernels, pair, x):
        return stack(trained, kernels, pair, x, ExecutionOptions(), shardings, "data")

    compiled = jax.jit(jax.grad(loss)).lower(*placed, x).compile()
    sent = {(o, kind(s, TOKENS // 8)) for o, s in collectives(compiled.as_text())}
    assert ("all-reduce", "kernel") in sent


EINSUM, LAYOUT = "BSD,CKDH->CBSKH", KernelLayout("soio")  # keys and values in one array, as Gemma's


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(), P(None, None, "data")], ids=["data parallel", "FSDP"])
def test_several_matrices_in_one_kernel(spec, axis_type):
    explicit, width, tokens = axis_type == AxisType.Explicit, 128, 1024
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    cut = NamedSharding(mesh, spec)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    n = width // R
    lam, gamma = 0.3 * draw(2, R, n), 0.3 * draw(2, n, width)
    pair = BasisPair(draw(R, width).astype(jnp.bfloat16), draw(width, n, R).astype(jnp.bfloat16))
    kernel, x = draw(2, 8, width, width // 8) / 11, draw(8, tokens // 8, width)

    def loss(lam, gamma, kernel, pair, x, sharding=None):
        def run(kernel, x):
            if sharding and explicit:
                kernel = jax.sharding.reshard(kernel, P())
            return jnp.einsum(EINSUM, x, kernel)

        placed = Kernel.traced(kernel, LAYOUT, sharding)
        layer = RunningLayer("here", run, [], placed, Contraction(EINSUM), jnp.float32)
        update = Update(lam, gamma, pair, 0.1, (width, width))
        options = ExecutionOptions("auto", ("data",) if sharding and not explicit else ())
        out = adapted(layer, x, [Contribution(update)], options)
        return (jnp.tanh(out) ** 2).mean()

    gradient = jax.jit(jax.grad(loss, (0, 1, 4)), static_argnums=5)
    expected = gradient(lam, gamma, kernel, pair, x)
    whole = NamedSharding(mesh, P())
    placed = (
        *jax.device_put((lam, gamma), whole),
        jax.device_put(kernel, cut),
        jax.device_put(pair, whole),
        jax.device_put(x, NamedSharding(mesh, P("data"))),
    )
    with jax.set_mesh(mesh) if explicit else nullcontext():
        compiled = gradient.lower(*placed, cut).compile()
        found = compiled(*placed)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 1e-5 * np.abs(b).max()
    sent = collectives(compiled.as_text())
    print(f"two matrices in one kernel, {spec}, {axis_type.name}: {sent}")
    summed = [shape for operation, shape in sent if operation == "all-reduce"]
    assert all(prod(shape) <= 2 * n * width for shape in summed), summed
    assert spec != P() or not [s for o, s in sent if o != "all-reduce" and prod(s) > 2 * n * width]


@pytest.mark.parametrize("kind, sparsity", [("dense", 0.0), ("sparse", 3.0)])
@pytest.mark.parametrize(
    "spec", [P(), P("data"), P(None, "data")], ids=["whole", "rows", "columns"]
)
def test_bases_are_drawn_where_they_lie(spec, kind, sparsity):
    """Nothing is sent, and the numbers are one device's."""
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), (AxisType.Auto,)), spec)
    identity, extents = BasisIdentity("jax", 7, kind, 16, sparsity), Extents(64, 8, 128)
    found, expected = draw(identity, extents, sharding), draw(identity, extents)
    for a, b in zip(found, expected, strict=True):
        assert a.sharding.is_equivalent_to(sharding, a.ndim)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    numbers = jax.jit(_draw, static_argnums=(1, 2, 3, 4), out_shardings=sharding)
    compiled = numbers.lower(prng_key(7), kind, 16, sparsity, extents).compile()
    assert not collectives(compiled.as_text())


# --- whole models ---------------------------------------------------------------------------------


# where the author of a model with explicit axes says its layers' outputs lie
OUT = {"up": P("data", None, "model"), "down": P("data", None, None)}


class LinenNet(nn.Module):
    explicit: bool = False

    @nn.compact
    def __call__(self, x):
        def dense(name, features):
            dot = partial(jax.lax.dot_general, out_sharding=OUT[name] if self.explicit else None)
            return nn.Dense(features, name=name, dot_general=dot)

        return x + dense("down", 32)(nn.gelu(dense("up", 64)(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs, explicit=False):
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.out = OUT if explicit else dict.fromkeys(OUT)

    def __call__(self, x):
        h = nnx.gelu(self.up(x, out_sharding=self.out["up"]))
        return x + self.down(h, out_sharding=self.out["down"])


CONFIG = RandLoraConfig(r=8, randlora_alpha=16, target_modules=["up", "down"])
X = jax.random.normal(jax.random.key(3), (16, 4, 32))
CUTS = {"up": P("data", "model"), "down": P("model", "data")}
TENSOR = {"up": P(None, "model"), "down": P("model", None)}
TX = optax.adam(1e-2)


def a_mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), (axis_type,) * 2)


def is_explicit(mesh):
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def on_the_mesh(mesh):
    """How kernels are cut (biases as their columns), the input, and what is said of it."""
    if mesh is None:
        return {}, X, {}
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    return (TENSOR, x, {}) if is_explicit(mesh) else (CUTS, x, {"token_axes": ["data"]})


def steps_of_linen(mesh):
    """Lambdas and gammas after some steps, and the model."""
    variables, net = LinenNet().init(jax.random.key(0), X), LinenNet(is_explicit(mesh))
    cuts, x, more = on_the_mesh(mesh)
    if mesh:

        def cut(path, leaf):
            spec = cuts[path[1].key]
            return NamedSharding(mesh, spec if leaf.ndim == 2 else P(*spec[1:]))

        variables = jax.device_put(variables, jax.tree_util.tree_map_with_path(cut, variables))
    model = get_peft_model(net.bind(variables), CONFIG, **more)
    frozen = dict(model.variables)
    trained = frozen.pop("randlora")
    state = TX.init(trained)

    @jax.jit
    def step(trained, state, frozen, x):
        def loss(trained):
            return (model.apply({**frozen, "randlora": trained}, x) ** 2).mean()

        updates, state = TX.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(3):
        trained, state = step(trained, state, frozen, x)
    model.variables = {**frozen, "randlora": trained}
    return jax.tree.leaves(trained), model


def steps_of_nnx(mesh):
    net = NnxNet(nnx.Rngs(0), is_explicit(mesh))
    cuts, x, more = on_the_mesh(mesh)
    for name, spec in cuts.items():
        layer = getattr(net, name)
        for leaf, cut in (("kernel", spec), ("bias", P(*spec[1:]))):
            placed = jax.device_put(getattr(layer, leaf)[...], NamedSharding(mesh, cut))
            setattr(layer, leaf, nnx.Param(placed))
    model = get_peft_model(net, CONFIG, **more)
    optimizer = nnx.Optimizer(model, TX, wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: (model(x) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model))

    for _ in range(3):
        step(model, optimizer, x)
    return jax.tree.leaves(nnx.state(model, AdapterParam)), model


def shared_bases(model):
    if isinstance(model, nnx.Module):
        return jax.tree.leaves(nnx.state(model, SharedBasis))
    return jax.tree.leaves(model.variables["randlora_bases"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("steps", [steps_of_linen, steps_of_nnx])
def test_training_on_a_mesh_is_training_on_one_device(steps, axis_type, tmp_path):
    expected, _ = steps(None)
    mesh = a_mesh(axis_type)
    with jax.set_mesh(mesh) if is_explicit(mesh) else nullcontext():
        trains_and_merges(steps, mesh, expected, tmp_path)


def trains_and_merges(steps, mesh, expected, tmp_path):
    found, model = steps(mesh)
    for a, b in zip(found, expected, strict=True):
        # Adam divides by the gradient's size, which magnifies rounding where it is tiny
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()), rtol=0)
    for array in shared_bases(model):
        assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == 8
    model.save_pretrained(tmp_path)
    kernels = {p: x.sharding for p, x in model._store.base_leaves().items()}
    before = {p: np.asarray(x) for p, x in model._store.base_leaves().items()}
    model.merge_adapter()
    assert {p: x.sharding for p, x in model._store.base_leaves().items()} == kernels
    model.unmerge_adapter()
    for path, x in model._store.base_leaves().items():
        np.testing.assert_array_equal(np.asarray(x), before[path])
        assert x.sharding == kernels[path]


def test_axes_that_are_not_there_are_refused():
    net = NnxNet(nnx.Rngs(0))
    with pytest.raises(ConfigError, match="no mesh"):
        get_peft_model(net, CONFIG, token_axes=["data"])
