"""Kernels and inputs that hold more than float32 lose nothing; those of 8 bits train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

FRESH = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear")
RANDOM = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)
rows = pytest.mark.parametrize("rows", [3, 200])  # beside the layer, and in its kernel


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape)


def net(dtype=None, **more):
    return nnx.Sequential(nnx.Linear(8, 6, dtype=dtype, rngs=nnx.Rngs(0), **more))


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


@rows
@pytest.mark.usefixtures("_float64")
def test_float64_stays_float64(rows):
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    x, plain = jnp.asarray(drawn(rows, 8)), net(**wide)
    kernel = plain.layers[0].kernel[...]
    model = get_peft_model(net(**wide), FRESH)
    np.testing.assert_array_equal(model(x), plain(x))
    model.merge_adapter()
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)

    model = get_peft_model(net(**wide), RANDOM, rngs=nnx.Rngs(1))
    (delta,) = model.delta_weights().values()
    plain.layers[0].kernel[...] = kernel + delta.T
    found = model(x)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_float64")
def test_a_wide_input_of_a_float32_layer_stays_wide():
    x, plain = jnp.asarray(drawn(3, 8)), net()
    np.testing.assert_array_equal(get_peft_model(net(), FRESH)(x), plain(x))


def test_a_complex_kernel_is_merged_and_goes_back_to_the_bit():
    model = get_peft_model(net(jnp.complex64, param_dtype=jnp.complex64), RANDOM, rngs=nnx.Rngs(1))
    x, kernel = jnp.asarray(drawn(3, 8), jnp.float32), model.layers[0].kernel[...]
    expected = model(x)
    model.merge_adapter()
    assert np.abs(model.layers[0].kernel[...] - kernel).max() > 0.1
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)


@rows
def test_complex_inputs_keep_their_imaginary_part(rows):
    x = jnp.asarray(drawn(rows, 8) + 1j * drawn(rows, 8)[::-1], jnp.complex64)
    model, plain = get_peft_model(net(), RANDOM, rngs=nnx.Rngs(1)), net()
    (delta,) = model.delta_weights().values()
    plain.layers[0].kernel[...] += delta.T
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_float8_kernel_is_adapted_and_trains():
    def make():
        held = net(jnp.bfloat16, param_dtype=jnp.float8_e4m3fn, kernel_init=nnx.initializers.ones)
        return held

    x = jnp.asarray(drawn(3, 8), jnp.bfloat16)
    model = get_peft_model(make(), RandLoraConfig(r=4, target_modules="all-linear"))
    slope = nnx.grad(
        lambda m: (m(x).astype(jnp.float32) ** 2).sum(), argnums=nnx.DiffState(0, AdapterParam)
    )
    lam, gamma = (
        slope(model)["model"]["layers"][0][f"randlora_{name}"]["default"]["kernel"][...]
        for name in ("lambda", "gamma")
    )
    assert lam.any() and not gamma.any()  # gamma's is zero while lambda is
    np.testing.assert_array_equal(model(x), make()(x))


def test_no_rows_are_as_good_as_many():
    assert get_peft_model(net(), RANDOM, rngs=nnx.Rngs(1))(jnp.ones((0, 8))).shape == (0, 6)


class Normed(nnx.Module):
    """A layer, and a norm that is trained whole."""

    def __init__(self, dtype):
        wide = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
        self.proj, self.norm = nnx.Linear(8, 6, **wide), nnx.LayerNorm(6, **wide)

    def __call__(self, x):
        return self.norm(self.proj(x))


def test_what_is_trained_whole_keeps_float64(tmp_path):
    config = RandLoraConfig(r=4, target_modules=["proj"], modules_to_save=["norm"])
    x = drawn(3, 8)
    with jax.enable_x64(True):
        model = get_peft_model(Normed(jnp.float64), config)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 1 / 3, nnx.state(model, AdapterParam)))
        expected = model(jnp.asarray(x))
        model.save_pretrained(tmp_path, names={".*": r"\g<0>"})
        again = RandLoraModel.from_pretrained(Normed(jnp.float64), tmp_path)
        np.testing.assert_array_equal(again(jnp.asarray(x)), expected)
        again.stack_adapters(2)
        scales = [found.merge_and_unload().norm.scale[...] for found in (again, model)]
        np.testing.assert_array_equal(*scales)
        numbers = jax.tree.map(np.float32, nnx.to_pure_dict(nnx.state(Normed(jnp.float64))))
    base = Normed(jnp.float32)
    nnx.update(base, numbers)
    with pytest.warns(UserWarning, match=r"'norm.(weight|bias)' holds float64 .* are rounded"):
        narrow = RandLoraModel.from_pretrained(base, tmp_path)
    np.testing.assert_allclose(narrow(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["complex64", "float64"])
@pytest.mark.parametrize("tokens", [1, 40, 400])  # with nothing formed for a row, A_flat, delta
@pytest.mark.parametrize("sizes", [(8, 6), (6, 8), (8, 40)])
def test_rows_with_adapters_of_their_own_stay_wide(sizes, tokens, kind):
    n_in, n_out = sizes
    with jax.enable_x64(kind == "float64"):
        x = drawn(3, tokens, n_in)
        x = jnp.asarray(x + 1j * x[::-1, ::-1] if kind == "complex64" else x, kind)
        base = nnx.Linear(n_in, n_out, param_dtype=jnp.finfo(kind).dtype, rngs=nnx.Rngs(0))
        model = get_peft_model(nnx.Sequential(base), RANDOM, rngs=nnx.Rngs(1))
        expected = model(x)
        found = model(x, adapter_names=["default"] * 3)
        assert found.dtype == kind
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.usefixtures("_float64")
def test_a_file_rounds_float64_and_says_so(tmp_path):
    wide = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    model = get_peft_model(net(**wide), FRESH)
    state = nnx.state(model, AdapterParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 1 / 3, state))
    with pytest.warns(UserWarning, match="'default': its lambda or gamma is float64, .* rounded"):
        model.save_pretrained(tmp_path, names={".*": r"\g<0>"})
