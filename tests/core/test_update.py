"""The arithmetic against PEFT's own layers, over shapes and ranks that hypothesis picks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft_layer import peft_layer

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.update import Update

pytestmark = pytest.mark.torch

# from 2: PEFT divides a single random number by its standard deviation, which is NaN
WIDTH = st.integers(2, 24)


def relative(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@given(WIDTH, WIDTH, st.integers(1, 30))
def test_delta_is_pefts(n_in, n_out, r):
    layer, update = peft_layer(n_in, n_out, r)
    expected = layer.get_delta_weight("default").detach().numpy()
    assert relative(update.formed().T, expected) < 1e-6


@pytest.mark.parametrize("n_in, n_out, r", [(12, 12, 5), (12, 20, 4), (20, 12, 5), (6, 20, 9)])
def test_known_mistakes_are_seen(n_in, n_out, r):
    layer, update = peft_layer(n_in, n_out, r)
    expected = layer.get_delta_weight("default").detach().numpy()
    good = np.asarray(update.formed().T)
    n = update.lam.shape[1]
    if n > 1:
        swapped = replace(
            update,
            pair=BasisPair(
                update.pair.A,
                update.pair.B[:, :n].transpose(0, 2, 1).reshape(update.pair.B.shape[0], n, r),
            ),
        )
        assert relative(swapped.formed().T, expected) > 1e-4
    if n_in == n_out:
        assert relative(good.T, expected) > 1e-4
    assert relative(good / update.scaling, expected) > 1e-4


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("n_in, n_out, r", [(12, 12, 5), (12, 20, 4), (20, 12, 5)])
def test_output_and_gradients_are_torchs(factored, n_in, n_out, r):
    layer, update = peft_layer(n_in, n_out, r)
    x = np.random.default_rng(1).normal(size=(7, n_in)).astype(np.float32)
    seen = torch.tensor(x, requires_grad=True)
    out = layer(seen) - layer.base_layer(seen)
    (out**2).sum().backward()

    def loss(lam, gamma, x):
        y = replace(update, lam=lam, gamma=gamma).applied(x, factored=factored)
        return (y**2).sum(), y

    grads, y = jax.grad(loss, (0, 1, 2), has_aux=True)(update.lam, update.gamma, jnp.asarray(x))
    assert relative(y, out.detach().numpy()) < 1e-5
    assert relative(grads[0], layer.randlora_lambda["default"].grad.numpy()) < 1e-5
    assert relative(grads[1], layer.randlora_gamma["default"].grad.numpy()) < 1e-5
    assert relative(grads[2], seen.grad.numpy()) < 1e-5


def test_second_derivatives_and_forward_mode():
    _, update = peft_layer(6, 9, 4)
    x = jnp.ones((2, 6))
    f = lambda lam: (replace(update, lam=lam).applied(x, factored=False) ** 2).sum()  # noqa: E731
    hessian = jax.jacfwd(jax.grad(f))(update.lam)
    assert np.isfinite(np.asarray(hessian)).all()
    np.testing.assert_allclose(
        jnp.einsum("abcd,ab,cd->", hessian, update.lam, update.lam), 2 * f(update.lam), rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_no_basis_is_transposed_in_memory(shape):
    """Neither in what is asked for nor in what the compiler makes of it."""
    _, update = peft_layer(*shape, 8)
    update = replace(update, pair=BasisPair(*(x.astype(jnp.bfloat16) for x in update.pair)))
    lowered = jax.jit(Update.formed).lower(update)
    assert "transpose" not in lowered.as_text()
    assert "transpose(" not in lowered.compile().as_text()
