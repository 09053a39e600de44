"""Layers of flax's that are told in their call, or when they are made, what they compute."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_nets import assert_runs_as_merged, wrapped
from nnx_nets import CONFIG, X, changed, close

from randlora_jax import get_peft_model


def of_signs(x, kernel, dimensions, precision=None, **_):
    """A product with the kernel's signs: no sum over the kernel that is stored."""
    return jax.lax.dot_general(x, jnp.sign(kernel) * 0.1 + 0.5 * kernel**3, dimensions)


def of_einsum(equation, x, kernel, **_):
    return jnp.einsum(equation, x, kernel**3)


def masked(*arrays, **_):
    """In place of flax's `promote_dtype`, of nnx or linen: it prunes the kernel."""
    x, kernel, bias = arrays[0] if len(arrays) == 1 else arrays
    return x, kernel * (jnp.arange(kernel.shape[0]) % 2).reshape(-1, *[1] * (kernel.ndim - 1)), bias


class Einsums(nnx.Module):
    def __init__(self):
        self.layer = nnx.Einsum("bd,dnh->bnh", (8, 2, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x, "bd,dnh->hbn")


LAYERS = {
    "Linear": lambda: nnx.Linear(8, 6, dot_general=of_signs, rngs=nnx.Rngs(0)),
    "LinearGeneral": lambda: nnx.LinearGeneral(8, (2, 3), dot_general=of_signs, rngs=nnx.Rngs(0)),
    "Einsum": lambda: nnx.Einsum("bd,de->be", (8, 6), einsum_op=of_einsum, rngs=nnx.Rngs(0)),
    "a mask": lambda: nnx.Linear(8, 6, promote_dtype=masked, rngs=nnx.Rngs(0)),
}


def held(name):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = LAYERS[name]()

        def __call__(self, x):
            return self.layer(x)

    return Net


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("name", LAYERS)
def test_a_product_of_the_users_own_sees_w_plus_delta(name, rows):
    make, x = held(name), jnp.resize(X, (rows, 8))
    model = get_peft_model(make(), CONFIG, rngs=nnx.Rngs(1))
    close(model(x), changed(make, model)(x))


def test_an_equation_in_the_call_counts_not_that_of_the_layer():
    model = get_peft_model(Einsums(), CONFIG, rngs=nnx.Rngs(1))
    assert model(X).shape == (3, 5, 2)
    close(model(X), changed(Einsums, model)(X))
    close(nnx.jit(lambda m, x: m(x))(model, X), changed(Einsums, model)(X))


class Given(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, dot_general=of_signs, name="dense")(x)
        x = nn.Dense(8, promote_dtype=masked, name="masked")(x)
        return nn.DenseGeneral((2, 3), dot_general_cls=lambda: of_signs, name="general")(x)


def test_linen_layers_alike():
    assert_runs_as_merged(wrapped(Given(), X, sample_inputs=(X,)), X)


class Vectors(nnx.Module):
    """Einsums whose kernels form no matrices, beside a layer."""

    def __init__(self):
        ones = {"kernel_init": nnx.initializers.ones, "rngs": nnx.Rngs(0)}
        self.scale = nnx.Einsum("bd,d->bd", (8,), **ones)
        self.summed = nnx.Einsum("bi,iok->bo", (8, 3, 2), **ones)
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.summed(self.up(self.scale(x)))


class LinenVectors(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = {"kernel_init": nn.initializers.ones, "use_bias": False}
        x = nn.Dense(8, name="up")(nn.Einsum((8,), "bd,d->bd", **ones)(x))
        return nn.Einsum((8, 3, 2), "bi,iok->bo", **ones)(x)


def test_a_kernel_that_forms_no_matrix_does_not_keep_the_others_from_being_adapted():
    model = get_peft_model(Vectors(), CONFIG, rngs=nnx.Rngs(1))
    assert model.targeted_module_names == ["up"]
    close(model(X), changed(Vectors, model)(X))
    linen = wrapped(LinenVectors(), X, sample_inputs=(X,))
    assert linen.targeted_module_names == ["up"]
    assert np.isfinite(linen(X)).all()
