"""Nearly best approximations, beside the singular values that the matrices were made with."""

from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.delta_factors import DeltaFactors, SharedB
from randlora_jax.interop.numpy_delta import flat_a

from randlora_jax.commands.low_rank import at_energy, factor, factor_leading

HIGH, SIDE, RANK = 900, 640, 40


def deltas_of(layers, a, b, alpha=1.0):
    """What `Deltas` is to those who take it apart; `layers` has (out, in), lambda and gamma."""
    return SimpleNamespace(
        adapter=SimpleNamespace(
            layers={name: parts for name, (_, *parts) in layers.items()},
            config=RandLoraConfig(r=len(a), randlora_alpha=alpha * len(a)),
        ),
        bases=(a, b),
        layers={name: SimpleNamespace(shape=shape) for name, (shape, *_) in layers.items()},
    )


@pytest.fixture(scope="module")
def directions():
    rng = np.random.default_rng(0)
    return [np.linalg.qr(rng.normal(size=(side, SIDE)))[0].astype("f4") for side in (HIGH, SIDE)]


def with_singular_values(values, directions, shape=(HIGH, SIDE), **more):
    """One basis of full rank can be any matrix."""
    left, right = directions
    gamma = np.ones((1, SIDE), "f4")
    layers = {"layer": (shape, np.asarray(values, "f4")[:, None], gamma)}
    deltas = deltas_of(layers, right.T[:, None], left[:, None], **more)
    return DeltaFactors(deltas, "layer", SharedB(deltas))


def product(found):
    return found.B.astype("f8") @ found.A


PLACES = np.arange(SIDE)
RNG = np.random.default_rng(1)
NOISE = np.linalg.svd(RNG.normal(size=(HIGH, SIDE)) / HIGH**0.5, compute_uv=False)
SPECTRA = {
    "all alike": np.ones(SIDE),
    "noise": NOISE,
    "falls in a line": np.linspace(1, 0, SIDE),
    "falls slowly": (PLACES + 1.0) ** -0.1,
    "falls": 1 / (PLACES + 1.0),
    "falls fast": np.exp(-PLACES / 20),
    "a step": np.where(PLACES < RANK, 1, 0.5),
    "a low step": np.where(PLACES < RANK, 1, 0.99),
    "a low step in noise": np.where(PLACES < RANK, 1.05 * NOISE[0], NOISE),
    "a lower step in noise": np.where(PLACES < RANK, 1.01 * NOISE[0], NOISE),
    "one large, noise": np.where(PLACES < 1, 30, NOISE),
    "of low rank": np.where(PLACES < 5, 1, 0),
    "of low rank, different": np.where(PLACES < 50, 2.0 ** -PLACES.clip(0, 60), 0),
}


@pytest.mark.parametrize("name", sorted(SPECTRA))
def test_it_keeps_what_the_best_keeps(name, directions):
    values = SPECTRA[name].astype("f4")
    delta = with_singular_values(values, directions)
    found = factor_leading(delta, lambda shares: RANK)
    energies = np.sort(np.square(values, dtype="f8"))[::-1]
    assert found.rank == RANK
    assert found.energy == pytest.approx(energies.sum(), rel=1e-5)
    assert 1 - 1e-4 <= found.kept / energies[:RANK].sum() <= 1 + 1e-5
    assert found.largest == pytest.approx(energies[0] ** 0.5, rel=1e-3)
    exact = delta.formed().astype("f8") * delta.scale
    lost = np.square(exact - product(found)).sum()
    assert found.energy - found.kept == pytest.approx(lost, abs=1e-5 * found.energy)
    again = factor_leading(with_singular_values(values, directions), lambda shares: RANK)
    assert (again.A == found.A).all() and (again.B == found.B).all()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("name", ["falls", "falls fast", "one large, noise", "noise"])
def test_the_rank_for_an_energy_is_the_lowest(name, energy, directions):
    energies = np.square(SPECTRA[name].astype("f4"), dtype="f8")
    shares = np.cumsum(energies) / energies.sum()
    rank = at_energy(energy, shares)
    found = factor_leading(
        with_singular_values(SPECTRA[name], directions), partial(at_energy, energy)
    )
    if found is None:  # the whole decomposition costs less
        assert rank > SIDE // 10
    else:
        assert found.rank == rank <= SIDE // 8
        assert energy <= found.share <= shares[rank - 1] + 1e-6


def test_ranks_that_do_not_pay_are_left_to_the_whole_decomposition(directions):
    delta = with_singular_values(SPECTRA["falls"], directions)
    assert factor_leading(delta, lambda shares: SIDE // 8) is not None
    assert factor_leading(delta, lambda shares: SIDE // 8 + 1) is None
    whole = factor(delta.formed(), lambda shares: RANK, delta.scale)
    assert whole.kept == pytest.approx(np.square(SPECTRA["falls"][:RANK]).sum(), rel=1e-5)
    assert whole.energy == pytest.approx(np.square(SPECTRA["falls"]).sum(), rel=1e-5)


def test_small_matrices_are_decomposed_whole():
    a, b = np.ones((8, 1, 16), "f4"), np.ones((20, 2, 8), "f4")
    deltas = deltas_of({"x": ((20, 16), np.ones((8, 2), "f4"), np.ones((2, 16), "f4"))}, a, b)
    assert factor_leading(DeltaFactors(deltas, "x", SharedB(deltas)), lambda shares: 1) is None


def test_nothing_is_kept_of_nothing(directions):
    found = factor_leading(with_singular_values(np.zeros(SIDE), directions), lambda shares: RANK)
    assert found.rank == 1 and found.share == 1 and not product(found).any()
    assert found.A.shape == (1, SIDE) and found.B.shape == (HIGH, 1)


def test_terms_that_cancel_tell_no_energy(directions):
    """Equal columns of B, and rows of A that nearly cancel in their sum."""
    left, right = directions
    layers = {"layer": ((HIGH, SIDE), np.ones((SIDE, 1), "f4"), np.ones((1, SIDE), "f4"))}
    rows = right.T - right.T.mean(0) * (1 - 1e-3)
    deltas = deltas_of(layers, rows[:, None].astype("f4"), np.ones_like(left)[:, None])
    delta = DeltaFactors(deltas, "layer", SharedB(deltas))
    assert delta.energy() is None
    assert factor_leading(delta, lambda shares: RANK) is None


@pytest.mark.parametrize("exponent", [-90, 90, 300])
def test_numbers_of_any_size(exponent, directions):
    """Products of float32 would be beyond it, or zero."""
    values = SPECTRA["falls"] * 2.0 ** min(exponent, 90)
    usual = factor_leading(with_singular_values(SPECTRA["falls"], directions), lambda shares: 8)
    found = factor_leading(
        with_singular_values(values, directions, alpha=2.0 ** max(exponent - 90, 0)),
        lambda shares: 8,
    )
    assert found.share == pytest.approx(usual.share, rel=1e-6)
    assert found.largest == pytest.approx(2.0**exponent * usual.largest, rel=1e-5)
    if exponent < 128:
        unit = np.float32(2.0 ** (exponent / 2))
        np.testing.assert_allclose(abs(found.A), abs(usual.A) * unit, rtol=2e-3, atol=1e-4 * unit)


LAYERS = {"a": (40, 30), "b": (12, 30), "c": (55, 30), "d": (30, 64), "e": (18, 18)}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_factors_of_layers_of_many_shapes(dtype, rng):
    """In any order, though it costs more; r divides no side."""
    r = 7
    low, high = sorted(max(sides) for sides in zip(*LAYERS.values(), strict=True))
    a, b = (rng.normal(size=s).astype(dtype) for s in [(r, 1, low), (high, -(-low // r), r)])
    layers = {}
    for name, shape in LAYERS.items():
        n = -(-min(shape) // r)
        lam, gamma = (rng.normal(size=s).astype("f4") for s in [(r, n), (n, min(shape))])
        layers[name] = shape, 1000 * lam, gamma / 50
    deltas = deltas_of(layers, a, b, alpha=3.0)
    shared = SharedB(deltas)
    for name in "abcdeacb":
        delta, (shape, lam, gamma) = DeltaFactors(deltas, name, shared), layers[name]
        n, smallest = gamma.shape
        M = b[: max(shape), :n].reshape(-1, n * r).astype("f8")
        M = 3.0 * M @ flat_a(lam, gamma, a[:, :, :smallest])
        x = rng.normal(size=(smallest, 5)).astype("f4")
        for found, expected in [
            (delta.formed() * delta.scale, M),
            (delta.times(x) * delta.scale, M @ x),
            (delta.gram_times(x) * delta.scale**2, M.T @ (M @ x)),
            (np.array(delta.energy() * delta.scale**2), np.square(M).sum()),
        ]:
            np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
        assert delta.shape == M.shape and delta.transposed == (shape[0] < shape[1])
