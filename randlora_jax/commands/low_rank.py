"""The product of two thin matrices that comes closest to a matrix.

Eckart and Young (1936): it projects on the leading right singular vectors, the eigenvectors of
M.T @ M with the largest eigenvalues. `factor` finds all of them. `factor_leading` finds those that
are wanted, and nearly: by block Lanczos from random vectors (Golub and Underwood, 1977; Musco and
Musco, 2015), which needs only products with M.T @ M. That is a power iteration that forgets none of
its steps, so a few steps reach what flat spectra would need a great many power iterations for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from randlora_jax.interop.delta_factors import DeltaFactors

Choose: TypeAlias = Callable[[np.ndarray], int]
"""A rank, from the shares of the energy that ranks 1, 2, ... keep; beyond them: a higher one."""

SEED = 0
ROWS = 1024  # of a matrix that are in float64 at a time
SMALL = 512  # smaller sides are soon decomposed whole
FEWEST = 24  # vectors looked for, however few are wanted
OVERSAMPLING = 8  # random vectors besides
LARGEST = 6  # times as many are held
STEPS = 40  # after which the whole decomposition costs less
TOLERANCE = 2e-4  # share of the kept energy that more steps may still add
CAUTION = 3  # by which more may come than the last gains tell
ROUNDING = 1e-6  # what is below it may be float32's


@dataclass(frozen=True)
class Factors:
    """Two thin matrices, whose product comes close to a larger one.

    Attributes:
      A: (rank, in) float32.
      B: (out, rank) float32. Both have the root of each singular value.
      energy: squared Frobenius norm of the larger matrix.
      kept: that of B @ A.
      largest: singular value.
    """

    A: np.ndarray
    B: np.ndarray
    energy: float
    kept: float
    largest: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.A)

    @property
    def share(self) -> float:
        """Kept energy by energy; 1 where there was nothing to keep."""
        return self.kept / self.energy if self.energy else 1.0

    @property
    def T(self) -> Factors:
        """Those of the transpose."""
        A, B = (np.ascontiguousarray(x.T) for x in (self.B, self.A))
        return Factors(A, B, self.energy, self.kept, self.largest)


def at_energy(energy: float, shares: np.ndarray) -> int:
    """The smallest rank that keeps at least `energy`, from the shares that ranks 1, 2, ... keep."""
    return int(np.searchsorted(shares, energy)) + 1


def factor(matrix: np.ndarray, choose: Choose, scale: float = 1.0) -> Factors:
    """The best approximation of `scale * matrix` (out, in) of the rank that `choose` chooses.

    The eigenvectors in float64 are as good as float32 can use, and cost a third of a full
    decomposition of the matrix. Memory: twice the smaller side squared, in float64.
    """
    n_out, n_in = matrix.shape
    if n_out < n_in:
        return factor(matrix.T, choose, scale).T
    parts = [slice(at, at + ROWS) for at in range(0, n_out, ROWS)]
    gram = np.zeros((n_in, n_in))
    for part in parts:
        block = matrix[part].astype(np.float64)
        gram += block.T @ block
    values, vectors = np.linalg.eigh(gram)
    energies = values[::-1].clip(0)  # rounding may leave some below
    total = float(energies.sum())
    rank = min(choose(np.cumsum(energies) / total), n_in) if total else 1
    vectors = vectors[:, ::-1][:, :rank]
    images = np.concatenate([matrix[part].astype(np.float64) @ vectors for part in parts])
    return _factors(vectors, images, total, scale)


def factor_leading(delta: DeltaFactors, choose: Choose) -> Factors | None:
    """Nearly the best approximation of M of the rank that `choose` chooses.

    It keeps at least 0.999 of what the best one keeps. The energy is M's own, and the rank the one
    it would be for the best one, if that is no close thing. The same on every run. None where the
    whole decomposition costs less: for small matrices, and for ranks above an eighth of the smaller
    side.
    """
    side = delta.shape[1]
    most = side // 8
    if side < SMALL or choose(np.ones(side)) > most:
        return None
    energy = delta.energy()
    if energy is None:
        return None
    if energy == 0:
        return _factors(np.zeros((side, 1)), np.zeros((delta.shape[0], 1)), 0, scale=1)
    wanted = choose(np.arange(1, side + 1) / side)  # where all directions have the same energy
    space = _Krylov(delta, max(FEWEST, min(wanted, side // 16)) + OVERSAMPLING)
    history: list[np.ndarray] = []
    for _ in range(STEPS):
        space.grow()
        history.append(space.values())
        sums = np.cumsum(history[-1])
        rank = choose(sums / energy)
        if len(history) > 1 and choose(_at_most(history[-1], side) / energy) > most:
            return None
        more = _to_come(history, rank)
        if more <= TOLERANCE * sums[:rank][-1] and choose((sums + more) / energy) == rank:
            vectors = space.vectors(rank + 1)  # one more, as rounding may ask for it
            images = delta.times(vectors)
            energies = np.square(images, dtype=np.float64).sum(0)
            rank = min(choose(np.cumsum(energies) / energy), len(energies))
            return _factors(vectors[:, :rank], images[:, :rank], energy, delta.scale)
    return None


class _Krylov:
    """What M.T @ M makes of random vectors in several steps, and M.T @ M there.

    Where that grows too large, its leading eigenvectors stand for it (the thick restart of Wu and
    Simon, 2000), which hardly costs a step more.
    """

    def __init__(self, delta: DeltaFactors, width: int) -> None:
        self._times = delta.gram_times
        self._width = width
        side = delta.shape[1]
        self._basis = np.empty((LARGEST * width, side), np.float32)  # orthonormal rows, of which
        self._size = 0  # are there
        self._projected = np.zeros((LARGEST * width, LARGEST * width))
        start = np.random.default_rng(SEED).standard_normal((side, width), np.float32)
        self._next = np.linalg.qr(start)[0]

    def grow(self) -> None:
        """Take one step."""
        if self._size == len(self._basis):
            self._restart(2 * self._width)
        start, stop = self._size, self._size + self._width
        self._basis[start:stop] = self._next.T
        self._size = stop
        known = self._basis[:stop]
        images = self._times(self._next)
        inside = known @ images
        self._projected[:stop, start:stop] = inside
        self._projected[start:stop, :stop] = inside.T
        self._next = _outside(known, images - known.T @ inside)

    def _restart(self, count: int) -> None:
        self._basis[:count] = self.vectors(count).T
        self._projected[:count, :count] = np.diag(self.values()[:count])
        self._size = count

    def values(self) -> np.ndarray:
        """The eigenvalues there, largest first."""
        return np.linalg.eigvalsh(self._projected[: self._size, : self._size])[::-1].clip(0)

    def vectors(self, count: int) -> np.ndarray:
        """(side, count), orthonormal: the eigenvectors with the largest eigenvalues."""
        vectors = np.linalg.eigh(self._projected[: self._size, : self._size])[1][:, ::-1]
        return self._basis[: self._size].T @ vectors[:, :count].astype(np.float32)


def _outside(known: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """An orthonormal basis of `vectors` (side, k) less what the rows of `known` span of them.

    Repeated where little is left of one, since that little may be rounding's.
    """
    while True:
        sizes = np.linalg.norm(vectors, axis=0)
        vectors, triangle = np.linalg.qr(vectors - known.T @ (known @ vectors))
        if (np.abs(triangle.diagonal()) > 0.1 * sizes).all():
            return vectors


def _at_most(values: np.ndarray, side: int) -> np.ndarray:
    """What ranks 1, 2, ... up to `side` can keep, as the larger values found tell."""
    sure = values[: max(1, len(values) // 4)]
    return np.cumsum(np.concatenate([sure, np.full(side - len(sure), sure[-1])]))


def _to_come(history: list[np.ndarray], rank: int) -> float:
    """What more steps would add to the energy of the first `rank` values, probably at most.

    Aitken (1926): as if each gain were to the one before as the last to its own. Lanczos does
    better in the end, but the ratio may rise before; and where a few large values have just been
    found, it is too low, so the last gain may come again. Gains that grow tell nothing: infinite.
    """
    if len(history) < 3 or 2 * rank > len(history[-1]):
        return np.inf
    before, last, now = (float(values[:rank].sum()) for values in history[-3:])
    gain, earlier = now - last, last - before
    if gain <= ROUNDING * now:
        return 0.0
    return gain * max(1.0, CAUTION * gain / (earlier - gain)) if gain < earlier else np.inf


def _factors(vectors: np.ndarray, images: np.ndarray, energy: float, scale: float) -> Factors:
    """Those of the projection on orthonormal `vectors` (in, rank), given the matrix times these."""
    energies = np.square(images, dtype=np.float64).sum(0)
    kept = float(energies.sum())
    roots = energies**0.25
    with np.errstate(over="ignore", invalid="ignore"):  # `largest` tells
        largest = float(np.sqrt(energies.max()) * scale)
        left = images * (scale**0.5 / np.where(roots > 0, roots, 1))
        right = (vectors * (scale**0.5 * roots)).T
        A, B = (np.ascontiguousarray(x, dtype=np.float32) for x in (right, left))
    # the energy was summed otherwise, and rounding must not make it the smaller of the two
    return Factors(A, B, max(energy, kept) * scale * scale, kept * scale * scale, largest)
