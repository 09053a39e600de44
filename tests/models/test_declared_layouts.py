"""What a layer is said to compute is held against its input and its kernel, by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import (
    AdapterParam,
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    get_peft_model,
)
from randlora_jax.layer_types import of_einsum

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
CONFIG = RandLoraConfig(r=3, target_modules="all-linear", init_weights=False)


class Own(nnx.Module):
    """A layer of a user's own: x @ w, or as an equation says."""

    def __init__(self, shape=(16, 8), equation="btd,dk->btk"):
        self.w = nnx.Param(nnx.Rngs(0).normal(shape))
        self.equation = equation

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class OwnLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.lecun_normal(), (16, 8))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return OwnLinen(name="own")(x)


def nnx_model(known, *made, **more):
    net = nnx.Sequential(Own(*made))
    return get_peft_model(net, CONFIG, layer_types={Own: known}, rngs=nnx.Rngs(1), **more)


def nnx_gradient(model, x):
    return nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, AdapterParam))(model)


TURNED = LayerType(KernelLayout("o i"), leaf="w")
KINDS = {
    "turned": (
        TURNED,
        ((16, 8),),
        r"kernel of shape \(16, 8\) takes \(\.\.\., 8\) by its layout 'oi'",
    ),
    "another letter": (
        of_einsum("btd,hdck->btchk", leaf="w"),
        ((16, 3, 2, 4), "btd,dchk->btchk"),
        r"kernel of shape \(16, 3, 2, 4\) takes \(b, t, 3\) by its equation 'btd,hdck->btchk'",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_an_input_that_the_kernel_does_not_take_is_refused_by_name(kind, apply):
    known, made, words = KINDS[kind]
    model = nnx_model(known, *made, apply=apply)
    words = (
        rf"layer 'layers.0' got x of shape \(2, 5, 16\).*{words}.*KernelLayout\('i o'\).*of_einsum"
    )
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x)), nnx_gradient):
        with pytest.raises(ConfigError, match=words):
            run(model, X)
    model.stack_adapters(2)
    with pytest.raises(ConfigError, match=words):
        model(X, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_it_is_in_linen_too(apply):
    net = LinenNet()
    bound = net.bind(net.init(jax.random.key(0), X))
    types = {OwnLinen: TURNED}
    more = {"layer_types": types, "sample_inputs": (X,), "apply": apply, "rngs": jax.random.key(1)}
    model = get_peft_model(bound, CONFIG, **more)
    trained, frozen = model.split()
    loss = lambda trained: (model.apply({**frozen, "randlora": trained}, X) ** 2).sum()  # noqa: E731
    for run in (lambda: model(X), lambda: jax.jit(jax.grad(loss))(trained)):
        with pytest.raises(ConfigError, match=r"layer 'own' got x of shape \(2, 5, 16\).*'oi'"):
            run()


def test_an_input_of_other_axes_is_refused_by_name():
    model = nnx_model(of_einsum("btd,dk->btk", leaf="w"), (16, 8), "...d,dk->...k")
    assert model(X).shape == (2, 5, 8)
    with pytest.raises(ConfigError, match=r"x of shape \(5, 16\).*takes \(b, t, 16\)"):
        model(X[0])


def test_a_result_of_another_shape_is_refused_with_delta_in_the_kernel_too():
    made = (4, 16, 6), "btd,hdk->bhtk"
    model = nnx_model(LayerType(KernelLayout("o i o"), leaf="w"), *made, apply="merged")
    words = r"layer 'layers.0'.*shape \(2, 4, 5, 6\).*\(2, 5, 4, 6\).*of_einsum"
    with pytest.raises(ConfigError, match=words):
        model(X)


def test_an_equation_without_the_axis_of_experts_is_refused_by_name():
    types = LayerType(KernelLayout("s i o"), of_einsum("btd,dk->btk").call, leaf="w")
    model = nnx_model(types, (3, 16, 8), "btd,edk->btek")
    with pytest.raises(ConfigError, match=r"'layers.0', a Own.*\(3, 16, 8\).*2 axes 'dk'"):
        model(X)


@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_out_axes_that_a_view_takes_for_a_stack_lie_where_they_are(apply):
    """As x @ kernel over the last axes has them."""
    net = nnx.Sequential(nnx.LinearGeneral(16, (3, 4), rngs=nnx.Rngs(0)))
    views = {"layers/0": "i s o"}
    model = get_peft_model(net, CONFIG, views=views, apply=apply, rngs=nnx.Rngs(1))
    assert model.delta_weights()["layers.0.1"].shape == (4, 16)
    found, slopes = model(X), jax.tree.leaves(nnx_gradient(model, X))
    assert all(np.isfinite(x).all() and np.any(x) for x in slopes)
    expected = model.merge_and_unload()(X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
