"""The arithmetic against PEFT's own layers, over shapes and ranks that hypothesis picks."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_jax.core.bases import Bases
from randlora_jax.core.delta import Term, delta, through_delta, through_factors

pytestmark = pytest.mark.torch

# from 2: PEFT divides a single random number by its standard deviation, which is NaN
WIDTH = st.integers(2, 24)


class One(torch.nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.lin = torch.nn.Linear(n_in, n_out, bias=False)

    def forward(self, x):
        return self.lin(x)


def peft_layer(n_in, n_out, r, seed=0, alpha=3.0):
    """A PEFT layer with random lambda and gamma, and the same numbers for us."""
    torch.manual_seed(seed)
    config = peft.RandLoraConfig(r=r, randlora_alpha=alpha, target_modules=["lin"])
    layer = peft.get_peft_model(One(n_in, n_out), config).base_model.model.lin
    with torch.no_grad():
        layer.randlora_lambda["default"].normal_()
        layer.randlora_gamma["default"].normal_()
    term = Term(
        jnp.asarray(layer.randlora_lambda["default"].detach().numpy()),
        jnp.asarray(layer.randlora_gamma["default"].detach().numpy()),
        Bases(
            jnp.asarray(layer.randlora_A["default"].float().numpy()[:, 0]),
            jnp.asarray(layer.randlora_B["default"].float().numpy()),
        ),
        alpha / r,
    )
    return layer, term


def relative(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@given(WIDTH, WIDTH, st.integers(1, 30))
def test_delta_is_pefts(n_in, n_out, r):
    layer, term = peft_layer(n_in, n_out, r)
    expected = layer.get_delta_weight("default").detach().numpy()
    assert relative(delta(term, n_in, n_out).T, expected) < 1e-6


@pytest.mark.parametrize("n_in, n_out, r", [(12, 12, 5), (12, 20, 4), (20, 12, 5), (6, 20, 9)])
def test_known_mistakes_are_seen(n_in, n_out, r):
    layer, term = peft_layer(n_in, n_out, r)
    expected = layer.get_delta_weight("default").detach().numpy()
    good = np.asarray(delta(term, n_in, n_out).T)
    n = term.lam.shape[1]
    if n > 1:
        swapped = term._replace(
            bases=Bases(
                term.bases.A,
                term.bases.B[:, :n].transpose(0, 2, 1).reshape(term.bases.B.shape[0], n, r),
            )
        )
        assert relative(delta(swapped, n_in, n_out).T, expected) > 1e-4
    if n_in == n_out:
        assert relative(good.T, expected) > 1e-4
    assert relative(good / term.scaling, expected) > 1e-4


@pytest.mark.parametrize("through", [through_factors, through_delta])
@pytest.mark.parametrize("n_in, n_out, r", [(12, 12, 5), (12, 20, 4), (20, 12, 5)])
def test_output_and_gradients_are_torchs(through, n_in, n_out, r):
    layer, term = peft_layer(n_in, n_out, r)
    x = np.random.default_rng(1).normal(size=(7, n_in)).astype(np.float32)
    seen = torch.tensor(x, requires_grad=True)
    out = layer(seen) - layer.base_layer(seen)
    (out**2).sum().backward()

    def loss(lam, gamma, x):
        y = through(x, term._replace(lam=lam, gamma=gamma), n_in, n_out)
        return (y**2).sum(), y

    grads, y = jax.grad(loss, (0, 1, 2), has_aux=True)(term.lam, term.gamma, jnp.asarray(x))
    assert relative(y, out.detach().numpy()) < 1e-5
    assert relative(grads[0], layer.randlora_lambda["default"].grad.numpy()) < 1e-5
    assert relative(grads[1], layer.randlora_gamma["default"].grad.numpy()) < 1e-5
    assert relative(grads[2], seen.grad.numpy()) < 1e-5


def test_second_derivatives_and_forward_mode():
    _, term = peft_layer(6, 9, 4)
    x = jnp.ones((2, 6))
    f = lambda lam: (through_delta(x, term._replace(lam=lam), 6, 9) ** 2).sum()  # noqa: E731
    hessian = jax.jacfwd(jax.grad(f))(term.lam)
    assert np.isfinite(np.asarray(hessian)).all()
    np.testing.assert_allclose(
        jnp.einsum("abcd,ab,cd->", hessian, term.lam, term.lam), 2 * f(term.lam), rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_no_basis_is_transposed_in_memory(shape):
    """Neither in what is asked for nor in what the compiler makes of it."""
    _, term = peft_layer(*shape, 8)
    term = term._replace(bases=Bases(*(x.astype(jnp.bfloat16) for x in term.bases)))
    lowered = jax.jit(lambda term: delta(term, *shape)).lower(term)
    assert "transpose" not in lowered.as_text()
    assert "transpose(" not in lowered.compile().as_text()
