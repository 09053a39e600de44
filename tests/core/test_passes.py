"""One function, a way of its own for each pass: values, derivatives of any order, what is kept."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from randlora_jax.core import applying
from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.contraction import LAST_AXES
from randlora_jax.core.cost import Plan, Sizes, cheapest, explained
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.layer_call import RunningLayer
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions, Way, possible_ways

SHAPES = {"square": (24, 24), "wide": (16, 36), "tall": (36, 16)}
R = 5
IN_KERNEL, FORMED, FACTORED = Way
BOTH = IN_KERNEL, FACTORED
PLANS = [Plan(*ways) for ways in product(BOTH, BOTH, (FORMED, FACTORED))]
PLANS += [Plan(IN_KERNEL, IN_KERNEL, IN_KERNEL)]


def random_update(n_in, n_out, r=R):
    low, high, n = min(n_in, n_out), max(n_in, n_out), -(-min(n_in, n_out) // r)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda key, *shape: jax.random.normal(key, shape)  # noqa: E731
    pair = BasisPair(draw(keys[2], r, low), draw(keys[3], high, n, r))
    return Update(draw(keys[0], r, n), draw(keys[1], n, low), pair, 0.1, (n_in, n_out))


def possible(shape, **changes):
    array = jax.ShapeDtypeStruct(shape, changes.pop("dtype", jnp.float32))
    kernel = Kernel(array, KernelLayout("io"))
    return possible_ways(kernel, LAST_AXES, array.dtype, ExecutionOptions(**changes))


def run(kernel, x):
    return x @ kernel + 1.0


def layer(kernel, x, update, dropped=None):
    drop = None if dropped is None else lambda x: x * dropped
    whole = Kernel(kernel, KernelLayout("io"))
    running = RunningLayer("here", run, [], whole, LAST_AXES, jnp.float32)
    return adapted(running, x, [Contribution(update, drop)], ExecutionOptions())


def plain(kernel, x, update, dropped=1.0):
    return x @ kernel + 1.0 + (x * dropped) @ update.formed()


def example(shape):
    n_in, n_out = SHAPES[shape]
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (3, 4, n_in))
    return jax.random.normal(keys[1], (n_in, n_out)), x, random_update(n_in, n_out)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=0)


@pytest.fixture(
    params=PLANS,
    ids=lambda p: "-".join(way.name.lower() for way in (p.forward, p.inputs, p.trained)),
)
def plan(request, monkeypatch):
    monkeypatch.setattr(applying, "cheapest", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_every_plan_has_the_same_derivatives(plan, shape):
    kernel, x, update = example(shape)

    def of(f):
        def scalar(kernel, x, lam, gamma):
            return (jnp.sin(f(kernel, x, replace(update, lam=lam, gamma=gamma))) ** 2).sum()

        return scalar

    at = (kernel, x, update.lam, update.gamma)
    # all of them, each alone (other tangents are zero then), forward mode, second derivatives
    for wanted in [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2)]:
        grad = jax.jit(jax.grad(of(layer), wanted))
        close(grad(*at), jax.grad(of(plain), wanted)(*at))
    step = jax.tree.map(jnp.cos, at)
    close(jax.jvp(of(layer), at, step), jax.jvp(of(plain), at, step))
    second = lambda f: jax.jvp(jax.grad(of(f), (1, 2)), at, step)[1]  # noqa: E731
    close(second(layer), second(plain))
    over = lambda f: jax.vmap(jax.grad(of(f), (1, 2)), (None, 0, None, None))  # noqa: E731
    close(over(layer)(*at), over(plain)(*at))


def test_dropout_is_seen_by_the_adapter_alone(plan, monkeypatch):
    kernel, x, update = example("wide")
    beside = Plan(*(FORMED if way is IN_KERNEL else way for way in vars(plan).values()))
    monkeypatch.setattr(applying, "cheapest", lambda *_: beside)
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, x.shape) * 2.0)

    def of(f):
        return lambda x, lam: (f(kernel, x, replace(update, lam=lam), mask) ** 2).sum()

    close(jax.grad(of(layer), (0, 1))(x, update.lam), jax.grad(of(plain), (0, 1))(x, update.lam))


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_kernel_sized_is_kept(plan, shape):
    kernel, x, update = example(shape)
    kinds = {kernel.shape, kernel.shape[::-1]}

    def kept(f):
        _, backward = jax.vjp(lambda x, lam: f(kernel, x, replace(update, lam=lam)), x, update.lam)
        held = [a for a in jax.tree.leaves(backward) if a.shape in kinds]
        return [a for a in held if not np.array_equal(a, kernel)]

    assert not kept(layer)
    assert kept(plain)  # the check can fail


@pytest.mark.parametrize("wrapped", [nn.remat, lambda f: f], ids=["remat", "plain"])
def test_inside_other_transformations(plan, wrapped):
    """A scan over stacked layers, under the user's own rematerialisation."""
    kernel, x, update = example("square")
    kernels = jnp.stack([kernel, 2 * kernel, -kernel]) / 8

    def of(f):
        def loss(lams):
            def body(x, layer):
                kernel, lam = layer
                return jnp.tanh(f(kernel, x, replace(update, lam=lam))), None

            body = jax.checkpoint(body) if wrapped is nn.remat else body
            return (jax.lax.scan(body, x, (kernels, lams))[0] ** 2).sum()

        return loss

    lams = jnp.stack([update.lam] * 3)
    close(jax.jit(jax.grad(of(layer)))(lams), jax.grad(of(plain))(lams))


POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "but names": jax.checkpoint_policies.save_anything_except_these_names("none"),
    "offloaded dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_users_policy_may_save_what_it_likes(policy):
    """JAX failed on it, with the barrier around some arguments; and would have saved delta."""
    kernel, x, update = example("wide")

    def loss(f, x, lam, gamma):
        h = f(kernel, x, replace(update, lam=lam, gamma=gamma))
        return (jnp.sin(f(2 * kernel, jnp.tanh(h[..., : x.shape[-1]]), update) + h) ** 2).sum()

    at = (x, update.lam, update.gamma)
    saving = jax.checkpoint(lambda *at: loss(layer, *at), policy=policy)
    expected = jax.grad(lambda *at: loss(plain, *at), (0, 1, 2))(*at)
    for grad in (jax.grad(saving, (0, 1, 2)), jax.jit(jax.grad(saving, (0, 1, 2)))):
        close(grad(*at), expected)
    second = lambda f: jax.jvp(jax.grad(f, 1), at, jax.tree.map(jnp.cos, at))[1]  # noqa: E731
    close(second(saving), second(lambda *at: loss(plain, *at)))
    _, backward = jax.vjp(saving, *at)
    kinds = {kernel.shape, kernel.shape[::-1]}
    held = jax.tree.leaves(backward)
    assert any(a.size == kernel.shape[1] * x.size // x.shape[-1] for a in held)  # a layer's output
    large = [a for a in held if a.shape in kinds]
    assert all(any(np.array_equal(a, k * kernel) for k in (1, 2)) for a in large)


# --- what it costs --------------------------------------------------------------------------------


def flops(f, *at):
    return jax.jit(f).lower(*at).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
def test_plans_cost_what_the_model_says(plan, shape, tokens):
    n_in, n_out = shape
    update, x, kernel = random_update(n_in, n_out, 8), jnp.ones((tokens, n_in)), jnp.ones(shape)

    def step(f, x, lam, gamma):
        return (jnp.sin(f(kernel, x, replace(update, lam=lam, gamma=gamma)))).sum()

    found = flops(jax.grad(lambda *at: step(layer, *at), (0, 1, 2)), x, update.lam, update.gamma)
    forward, backward = Sizes(tokens, n_in, n_out, update.lam.size).work(plan)
    expected = 4 * tokens * n_in * n_out + forward.flops + backward.flops
    # the CPU compiler notices that delta is formed twice and forms it once, in the layer's width
    once = 2 * update.lam.size * n_in * n_out if plan.forward is plan.inputs is IN_KERNEL else 0
    # and that both factored passes of x multiply it with B, and does that once
    if plan.forward is plan.trained is FACTORED and n_in > n_out:
        once += 2 * tokens * n_in * update.lam.size
    assert expected - once <= found * 1.02 and found <= expected * 1.08, (found, expected)


def test_the_cheapest_plan_is_chosen():
    for tokens, n_in, n_out in product((1, 16, 64, 256, 1024, 4096), (64, 256, 1024), (64, 512)):
        sizes = Sizes(tokens, n_in, n_out, min(n_in, n_out))
        costs = {p: sum(w.cost for w in sizes.work(p)) for p in PLANS}
        chosen = cheapest(possible((n_in, n_out)), sizes)
        assert costs[chosen] == min(costs.values())
    square = lambda tokens: Sizes(tokens, 4096, 4096, 4096)  # noqa: E731
    ways = possible((4096, 4096))
    assert cheapest(ways, square(1)) == Plan(FACTORED, FACTORED, FACTORED)
    assert cheapest(ways, square(65536)) == Plan(IN_KERNEL, IN_KERNEL, FORMED)
    between = cheapest(ways, square(3072))
    assert (between.forward, between.trained) == (IN_KERNEL, FACTORED)


@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (512, 128), (4096, 4096)])
def test_a_stack_of_layers_costs_what_full_fine_tuning_does(shape):
    """(6 + 6 min / T) / 4 of the frozen stack, within 5%; lowered from shapes alone."""
    tokens, r, depth = 16 * max(shape), 32, 2
    n = -(-min(shape) // r)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    update = (of(r, n), of(n, min(shape)))
    pair = BasisPair(of(r, min(shape)), of(max(shape), n, r))
    kernels = [of(*(shape if i % 2 == 0 else shape[::-1])) for i in range(depth)]

    def adapted_stack(x, updates, kernels, pair):
        for kernel, update in zip(kernels, updates, strict=True):
            x = layer(kernel, x, Update(*update, pair, 0.1, kernel.shape))
        return jnp.sum(x**2)

    def frozen_stack(x, kernels):
        for kernel in kernels:
            x = run(kernel, x)
        return jnp.sum(x**2)

    x, updates = of(tokens, shape[0]), [update] * depth
    ours = flops(jax.grad(adapted_stack, (0, 1)), x, updates, kernels, pair)
    frozen = flops(jax.grad(frozen_stack), x, kernels)
    expected = (6 + 6 * min(shape) / tokens) / 4
    assert abs(ours / frozen / expected - 1) <= 0.05, (ours / frozen, expected)


def test_the_gradient_of_delta_copies_no_activation():
    """Summing over (batch, length) as one axis: XLA's CPU compiler transposes to sum over two."""
    (n_in, n_out), update = (128, 384), random_update(128, 384, 16)
    x, kernel = jnp.ones((8, 512, n_in)), jnp.ones((n_in, n_out))

    def transposed(f):
        def loss(x, lam, gamma):
            return (f(kernel, x, replace(update, lam=lam, gamma=gamma)) ** 2).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, update.lam, update.gamma).compile()
        return any(f"f32[{n},{8 * 512}]" in compiled.as_text() for n in (n_in, n_out))

    assert transposed(plain) and not transposed(layer)


def test_what_was_chosen_is_said():
    sizes = Sizes(3072, 4096, 4096, 4096)
    line = explained("attention.q", possible((4096, 4096)), sizes)
    assert "attention.q (4096 -> 4096): forward: W + delta_W" in line
    assert "lambda and gamma: factored" in line
    many = Sizes(65536, 4096, 4096, 4096)
    beside = explained("q", possible((4096, 4096), dtype=jnp.bfloat16), many)
    assert "forward: x delta_W beside" in beside
    assert "not W + delta_W: in the output, a small delta_W would drown" in beside


def test_bytes_moved_are_those_of_the_dtype():
    """Where it multiplies in 16 bits; float16 forms delta in 32."""
    layer = 8, 64, 32, 32  # tokens, in, out, flat rank
    factored, merged = (Plan(way, way, way) for way in (Way.FACTORED, Way.IN_KERNEL))
    wide = Sizes(*layer)
    assert Sizes.in_dtype(jnp.float32, *layer) == wide
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = Sizes.in_dtype(dtype, *layer)
        for found, expected in zip(narrow.work(factored), wide.work(factored), strict=True):
            assert found.flops == expected.flops and found.bytes == expected.bytes / 2
    formed = {d: Sizes.in_dtype(d, *layer).work(merged)[0].bytes for d in ("bfloat16", "float16")}
    basis, others = 2 * 64 * 32, 32 * 32 + 2 * 64 * 32
    assert formed["float16"] == wide.work(merged)[0].bytes == basis + 4 * others
    assert formed["bfloat16"] == basis + 2 * others
