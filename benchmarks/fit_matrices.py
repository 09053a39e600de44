"""How well each adapter can be a given matrix: RandLoRA, LoRA and VeRA with equally many numbers.

    make fit      a few minutes; prints a table, writes out/fit/

The paper's central claim is that an update of full rank needs an adapter of full rank. So matrices
of several spectra, 64 x 64, are approximated as closely as each method can. LoRA's closest matrix
is the truncated SVD. RandLoRA and VeRA (B diag(d) A, its rows scaled, A and B random) are linear in
either half of their trained numbers, so that alternating least squares fits them without a learning
rate that might favour one; several starts, the best is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import drawings
import measured
import numpy as np
from rich.progress import track

from randlora_jax.core.bases import BasisIdentity, draw, used_extents

OUT = Path("out/fit")
SIZE, SWEEPS, STARTS = 64, 30, 2
RANKS = (1, 2, 4, 8, 16, 32)  # LoRA's
SPECTRUM_AT = 8  # the rank of LoRA whose spectrum, and that of its equals, is drawn
MOST_VERA = 2048  # numbers: least squares over more takes long
Array = np.ndarray
Fit = tuple[Array, int]  # the matrix, and how many numbers were trained


def targets() -> dict[str, Array]:
    """Matrices (SIZE, SIZE) of unit Frobenius norm: a spectrum between random rotations."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    order = np.arange(1, SIZE + 1)
    spectra = {
        "all singular values equal": np.ones(SIZE),
        "Gaussian": np.linalg.svd(random.normal(size=(SIZE, SIZE)), compute_uv=False),
        "falling as 1 / sqrt(k)": order**-0.5,
        "falling as 1 / k": 1.0 / order,
        "rank 8": (order <= 8).astype(float),
    }
    return {
        name: (left * (values / np.linalg.norm(values))) @ right for name, values in spectra.items()
    }


def lora(target: Array, rank: int) -> Fit:
    """The closest product of (SIZE, rank) and (rank, SIZE)."""
    u, s, vt = np.linalg.svd(target)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], 2 * SIZE * rank


def randlora(target: Array, rank: int) -> Fit:
    """The sum over n of B_n diag(lambda_n) A diag(gamma_n), with about as many numbers as LoRA's.

    n bases of rank r = SIZE / n hold n (r + SIZE) numbers; the bases are the library's own.
    """
    numbers = {r: math.ceil(SIZE / r) * (r + SIZE) for r in range(1, SIZE + 1)}
    r = min(numbers, key=lambda r: abs(numbers[r] - 2 * SIZE * rank))
    extents = used_extents((SIZE, SIZE), r)
    n = extents.n
    fits = []
    for seed in range(STARTS):
        pair = draw(BasisIdentity.drawn(seed, "dense", r, SIZE), extents)
        a, b = (np.asarray(x, float) for x in pair)  # (r, SIZE), (SIZE, n, r)
        gamma, gram = np.ones((n, SIZE)), np.einsum("inr,ims->nrms", b, b)
        for _ in range(SWEEPS):
            rows = np.einsum("ri,ni->nri", a, gamma)  # what lambda scales
            normal = gram * np.einsum("nri,msi->nrms", rows, rows)
            right = np.einsum("inr,ij,nrj->nr", b, target, rows, optimize=True)
            lam = solve(normal.reshape(n * r, -1), right.ravel()).reshape(n, r)
            parts = np.einsum("inr,nr,rj->jin", b, lam, a, optimize=True)  # what gamma scales
            normal, right = parts.swapaxes(1, 2) @ parts, np.einsum("jin,ij->jn", parts, target)
            gamma = solve(normal, right[..., None])[..., 0].T
        fits.append(np.einsum("jin,nj->ij", parts, gamma))
    return closest(fits, target), numbers[r]


def vera(target: Array, rank: int) -> Fit | None:
    """diag(b) B diag(d) A, with as many numbers as LoRA's; None where that is too many to fit."""
    inner = 2 * SIZE * rank - SIZE
    if SIZE + inner > MOST_VERA:
        return None
    fits = []
    for seed in range(STARTS):
        random = np.random.default_rng(seed)
        left, right = random.normal(size=(SIZE, inner)), random.normal(size=(inner, SIZE))
        rows, between = np.ones(SIZE), right @ right.T
        for _ in range(SWEEPS):
            scaled = rows[:, None] * left
            normal = (scaled.T @ scaled) * between
            d = solve(normal, np.einsum("ik,ij,kj->k", scaled, target, right, optimize=True))
            made = (left * d) @ right
            rows = (made * target).sum(1) / (made * made).sum(1)
        fits.append(rows[:, None] * made)
    return closest(fits, target), SIZE + inner


def solve(normal: Array, right: Array) -> Array:
    """Least squares from the normal equations, which may be singular."""
    size = normal.shape[-1]
    ridge = 1e-10 * np.trace(normal, axis1=-2, axis2=-1)[..., None, None] / size
    return np.linalg.solve(normal + ridge * np.eye(size), right)


def closest(fits: list[Array], target: Array) -> Array:
    """The one of `fits` that misses least."""
    return min(fits, key=lambda fit: missed(fit, target))


def missed(fit: Array, target: Array) -> float:
    """The share of the target's energy that a fit misses."""
    return float(np.linalg.norm(fit - target) ** 2 / np.linalg.norm(target) ** 2)


METHODS: dict[str, Callable[[Array, int], Fit | None]] = {
    "LoRA": lora,
    "RandLoRA": randlora,
    "VeRA": vera,
}


def main() -> None:
    """Fits everything, then the table and the picture."""
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = targets()
    jobs = [(t, m, rank) for t in wanted for m in METHODS for rank in RANKS]
    fits = {
        job: fit
        for job in track(jobs, "fitting")
        if (fit := METHODS[job[1]](wanted[job[0]], job[2])) is not None
    }
    print("share of the energy missed, at about the numbers of LoRA of a rank\n")
    print("| matrix | method |", *(f"{rank} |" for rank in RANKS))
    print("|---" * (len(RANKS) + 2) + "|")
    for t in wanted:
        for m in METHODS:
            shares = [
                f"{missed(fits[t, m, k][0], wanted[t]):.3f}" if (t, m, k) in fits else ""
                for k in RANKS
            ]
            print(f"| {t} | {m} |", *(f"{share} |" for share in shares))
    measured.keep(OUT / "fit.json", "make fit", numbers(wanted, fits))
    measured.draw(drawings.fit, OUT / "fit.json", OUT / "fit.png")


def numbers(wanted: dict[str, Array], fits: dict[Any, Fit]) -> dict[str, Any]:
    """What is drawn of them."""
    found: dict[str, Any] = {}
    for t, target in wanted.items():
        methods = {}
        for m in METHODS:
            made = [fits[t, m, rank] for rank in RANKS if (t, m, rank) in fits]
            methods[m] = {
                "numbers": [count for _, count in made],
                "missed": measured.rounded([missed(fit, target) for fit, _ in made]),
                "spectrum": spectrum(fits[t, m, SPECTRUM_AT][0]),
            }
        found[t] = {"entries": target.size, "spectrum": spectrum(target), "methods": methods}
    return found


def spectrum(matrix: Array) -> list[float]:
    """The singular values."""
    return measured.rounded(np.linalg.svd(matrix, compute_uv=False))


if __name__ == "__main__":
    main()
