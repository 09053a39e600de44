"""Rows with adapters of their own, in every order: each gets what its own delta makes of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from randlora_jax.core.bases import BasisIdentity, Extents, draw
from randlora_jax.core.rows import RowOrder, RowUpdates

SHAPES = {"in < out": (24, 40), "in > out": (40, 24), "square": (24, 24), "one number": (1, 7)}
ROWS = 3
ORDERS = pytest.mark.parametrize("order", RowOrder)


def row_updates(matrix, r, parts=1, rows=ROWS, scale=1.0):
    """Random lambda and gamma for every row, over bases larger than the matrix slices."""
    low, high = sorted(matrix)
    n = -(-low // r)
    pair = draw(BasisIdentity.drawn(0, "dense", r, low + 3), Extents(high + 2, n + 1, low + 3))
    keys = jax.random.split(jax.random.key(1), 2)
    lam = scale * jax.random.normal(keys[0], (rows, parts, r, n))
    gamma = jax.random.normal(keys[1], (rows, parts, n, low)) / high
    return RowUpdates(lam, gamma, pair, matrix)


def inputs(matrix, tokens, dtype=jnp.float32, rows=ROWS):
    return jax.random.normal(jax.random.key(2), (rows, tokens, matrix[0]), dtype)


def of_row(updates, row):
    """The updates of one row, one for each part."""
    return [updates.alone(*both) for both in zip(updates.lam[row], updates.gamma[row], strict=True)]


def exact(x, updates):
    """Each row by its own delta, in float64."""
    deltas = [
        sum(np.asarray(update.formed(), np.float64) for update in of_row(updates, row))
        for row in range(x.shape[0])
    ]
    rows = zip(np.asarray(x, np.float64), deltas, strict=True)
    return np.stack([x @ delta for x, delta in rows])


def apart(found, wanted):
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


@ORDERS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r, parts, tokens", [(4, 1, 1), (9, 1, 1), (4, 2, 3), (9, 2, 3)])
def test_each_row_gets_its_own_delta(order, shape, r, parts, tokens):
    matrix = SHAPES[shape]
    updates, x = row_updates(matrix, r, parts), inputs(matrix, tokens)
    found = jax.jit(RowUpdates.applied, static_argnums=2)(updates, x, order)
    assert found.dtype == x.dtype
    assert apart(found, exact(x, updates)) < 1e-6


@ORDERS
@pytest.mark.parametrize("shape", SHAPES)
def test_lambda_zero_adds_nothing_and_rows_do_not_mix(order, shape):
    matrix = SHAPES[shape]
    updates, x = row_updates(matrix, 4), inputs(matrix, 2)
    off = replace(updates, lam=updates.lam.at[1].set(0))
    assert off.changed().tolist() == [True, False, True]
    found = np.asarray(off.applied(x, order))
    assert not found[1].any() and np.abs(found[0]).max() > 0
    order_of_rows = jnp.asarray([2, 0, 1])
    moved = replace(off, lam=off.lam[order_of_rows], gamma=off.gamma[order_of_rows])
    np.testing.assert_array_equal(moved.applied(x[order_of_rows], order), found[order_of_rows])


@ORDERS
@pytest.mark.parametrize("rows, tokens", [(0, 2), (2, 0)])
def test_no_rows_and_no_tokens(order, rows, tokens):
    matrix = (24, 40)
    updates, x = row_updates(matrix, 4, rows=rows), inputs(matrix, tokens, rows=rows)
    assert updates.applied(x, order).shape == (rows, tokens, 40)


@ORDERS
@pytest.mark.parametrize(
    "n_in, n_out, r", [(96, 160, 16), (96, 160, 8), (160, 96, 16), (160, 96, 8)]
)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits_it_is_as_exact_as_one_adapter_for_all(order, n_in, n_out, r, scale, dtype):
    """The smallest is beyond what float16 holds: it must not come out as zero."""
    matrix = n_in, n_out
    updates, x = row_updates(matrix, r, scale=scale), inputs(matrix, 2, dtype)
    wanted = exact(x, updates)
    alone = jnp.stack(
        [of_row(updates, row)[0].applied(x[row], factored=True) for row in range(ROWS)]
    )
    found = updates.applied(x, order)
    assert found.dtype == alone.dtype == jnp.float32

    def error(y):
        return np.std(np.asarray(y, np.float64) - wanted) / np.std(wanted)

    assert error(found) < 1.5 * error(np.asarray(alone, np.float64)), error(found)


@ORDERS
@pytest.mark.parametrize("shape", ["in < out", "in > out"])
def test_gradients_are_those_of_each_rows_delta(order, shape):
    matrix = SHAPES[shape]
    updates, x = row_updates(matrix, 4, parts=2), inputs(matrix, 2)

    def by_row(lam, gamma, x):
        mine = replace(updates, lam=lam, gamma=gamma)
        return (jnp.sin(mine.applied(x, order)) ** 2).sum()

    def one_by_one(lam, gamma, x):
        mine = replace(updates, lam=lam, gamma=gamma)
        made = [
            sum(update.applied(x[row], factored=False) for update in of_row(mine, row))
            for row in range(ROWS)
        ]
        return (jnp.sin(jnp.stack(made)) ** 2).sum()

    at = updates.lam, updates.gamma, x
    found = jax.grad(by_row, (0, 1, 2))(*at)
    wanted = jax.grad(one_by_one, (0, 1, 2))(*at)
    for mine, right in zip(found, wanted, strict=True):
        assert np.abs(right).max() > 0 and apart(mine, np.asarray(right)) < 2e-5


@pytest.mark.torch
@ORDERS
@pytest.mark.parametrize("n_in, n_out, r", [(12, 12, 5), (12, 20, 4), (20, 12, 5)])
def test_rows_are_pefts_own_layers(order, n_in, n_out, r):
    """Three PEFT layers of one key; each row by the delta of its own."""
    peft_layer = pytest.importorskip("peft_layer").peft_layer
    layers, mine = zip(*(peft_layer(n_in, n_out, r, seed) for seed in range(ROWS)), strict=True)
    np.testing.assert_array_equal(mine[0].pair.B, mine[2].pair.B)
    lam = jnp.stack([update.lam for update in mine])[:, None] * mine[0].scaling
    gamma = jnp.stack([update.gamma for update in mine])[:, None]
    updates = RowUpdates(lam, gamma, mine[0].pair, (n_in, n_out))
    x = inputs((n_in, n_out), 2)
    deltas = [layer.get_delta_weight("default").detach().numpy() for layer in layers]
    wanted = np.stack([row @ delta.T for row, delta in zip(np.asarray(x), deltas, strict=True)])
    assert apart(updates.applied(x, order), wanted) < 1e-6
