"""Layers as sums over axes of their input: every way to apply an update, for any einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.contraction import Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.layer_call import RunningLayer
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.models.layer_types import LayerType, of_axes, of_einsum

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)


def move(model):
    rng = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(move, nnx.state(model, AdapterParam)))


# equation, the layout of its kernel, shapes of input and kernel
EINSUMS = [
    ("BTD,DNH->BTNH", "ioo", (2, 3, 8), (8, 2, 5)),
    ("BTNH,NHD->BTD", "iio", (2, 3, 2, 5), (2, 5, 8)),
    ("BTD,NDH->BTNH", "oio", (2, 3, 8), (2, 8, 5)),
    ("BSD,CKDH->CBSKH", "soio", (2, 3, 8), (2, 2, 8, 5)),  # as Gemma's keys and values
    ("...TM, MD -> ...TD", "io", (2, 3, 8), (8, 5)),
    ("bnd,ndh->bnh", "sio", (2, 3, 8), (3, 8, 5)),
    ("dt,do->to", "io", (8, 3), (8, 5)),
    ("betd,edo->teob", "sio", (2, 4, 3, 8), (4, 8, 5)),
]
einsums = pytest.mark.parametrize(
    ("equation", "axes", "x_shape", "shape"), EINSUMS, ids=[e[0] for e in EINSUMS]
)


@einsums
def test_einsums_are_understood(equation, axes, x_shape, shape):
    known = of_einsum(equation)
    assert KernelLayout(axes).splits(known.layout) and known.call == Contraction(equation)


@einsums
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
@pytest.mark.parametrize("low_precision", [False, True])
def test_einsums_of_every_form(equation, axes, x_shape, shape, apply, low_precision):
    """W + delta through the einsum itself, and its derivatives, are what every way gives."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    draw = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    stack, n_in, n_out = KernelLayout(axes).sizes(shape)
    low, high, r = min(n_in, n_out), max(n_in, n_out), 3
    n = -(-low // r)
    lam, gamma = draw(*stack, r, n), draw(*stack, n, low)
    pair = BasisPair(draw(r, low), draw(high, n, r))
    kernel, x = draw(*shape), draw(*x_shape)
    run = lambda kernel, x: jnp.einsum(equation, x, kernel)  # noqa: E731
    update = lambda lam, gamma: Update(lam, gamma, pair, 0.3, (n_in, n_out))  # noqa: E731

    def ours(kernel, x, lam, gamma):
        whole = Kernel(kernel, KernelLayout(axes))
        dtype = jnp.bfloat16 if low_precision else jnp.float32  # what it says of itself
        layer = RunningLayer("here", run, [], whole, Contraction(equation), dtype)
        return adapted(layer, x, [Contribution(update(lam, gamma))], ExecutionOptions(apply))

    def plain(kernel, x, lam, gamma):
        return run(Kernel(kernel, KernelLayout(axes)).taking([update(lam, gamma)]), x)

    at = (kernel, x, lam, gamma)
    gradients = lambda f: jax.grad(lambda *at: (f(*at) ** 2).sum(), (1, 2, 3))(*at)  # noqa: E731
    pairs = zip([ours(*at), *gradients(ours)], [plain(*at), *gradients(plain)], strict=True)
    for found, expected in pairs:
        allowed = 0.02 if low_precision else 1e-4
        np.testing.assert_allclose(found, expected, atol=allowed * float(jnp.abs(expected).max()))


def test_an_einsum_that_sums_its_tokens_runs_merged():
    assert of_einsum("btd,dh->bh") == LayerType(KernelLayout("io"), call=None)
    layer = nnx.Einsum("btd,dh->bh", (12, 7), rngs=nnx.Rngs(0))
    config = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["layers.0"])
    model = get_peft_model(nnx.Sequential(layer), config)
    move(model)
    kernel = layer.kernel[...] + model.delta_weights()["layers.0"].T
    np.testing.assert_allclose(model(X), (X @ kernel).sum(1), atol=1e-4)


def test_one_token_forms_no_delta():
    """Keys and values in one einsum, as when decoding: the cost of PEFT's factors, no more."""
    width = 512
    model = get_peft_model(
        nnx.Sequential(nnx.Einsum("BSD,CKDH->CBSKH", (2, 8, width, 64), rngs=nnx.Rngs(0))),
        RandLoraConfig(r=32, target_modules=["layers.0"]),
        views={"layers/0": "s o i o"},
    )
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    # factors: three times the frozen layer, and A_flat; delta would be 512 times, for one token
    for tokens, most in ((1, 6), (4096, 1.2)):
        compiled = run.lower(state, jnp.ones((1, tokens, width))).compile()
        frozen = 2 * tokens * 2 * width * width
        assert frozen < compiled.cost_analysis()["flops"] <= most * frozen


def test_an_einsum_that_sums_its_kernel_alone_is_refused():
    with pytest.raises(ConfigError, match="its kernel alone"):
        of_einsum("bi,iok->bo")


@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("apply", ["merged", "factored"])
def test_general_layers_over_other_axes(axis, apply):
    layer = nnx.LinearGeneral(5, 7, axis=axis, rngs=nnx.Rngs(0))  # over the middle axis
    config = RandLoraConfig(r=2, randlora_alpha=4, target_modules=["layers.0"])
    model = get_peft_model(nnx.Sequential(layer), config, apply=apply)
    move(model)
    kernel = layer.kernel[...] + model.delta_weights()["layers.0"].T
    np.testing.assert_allclose(model(X), jnp.einsum("bti,to->bio", X, kernel), atol=1e-5)


def test_general_layers_as_einsums():
    assert of_axes(1, 2, (-1,)) == LayerType(KernelLayout("ioo"))
    found = {
        args: of_axes(*args).call.equation
        for args in [(2, 1, (1, 2)), (2, 1, (-1, -2)), (1, 1, (-1,), 1), (1, 1, (2,), 1)]
    }
    assert found == {
        (2, 1, (1, 2)): "Aab...,abc->A...c",
        (2, 1, (-1, -2)): "...ba,abc->...c",
        (1, 1, (-1,), 1): "a...b,abc->a...c",
        (1, 1, (2,), 1): "aBb...,abc->aB...c",
    }
    assert of_axes(2, 1, (0, -1)).call is None
