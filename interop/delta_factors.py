"""delta_W left in its two factors: products with it, and its energy, without forming it.

    M (max, min) = scale * B_flat @ A_flat       delta_W, or its transpose where out is smaller

    M.T @ M = scale^2 * A_flat.T @ (B_flat.T @ B_flat) @ A_flat

Forming M costs 2 max K min operations, K = n * r being at least min. What stands in the middle of
the second line, B's Gram matrix (K, K), belongs to all layers: one with fewer rows has it of fewer
rows, one with fewer bases has its leading part. With it a product of M.T @ M costs the same however
long the larger side is, and so does the energy, the squared Frobenius norm of M.

All numbers are float32, and powers of two are taken out of the factors, so that their products stay
in its range whatever an adapter holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import frexp

import numpy as np
from randlora_jax.interop.numpy_delta import BLOCK, Deltas, flat_a

PANEL = 512  # rows of a symmetric matrix that are worked on at a time
CANCELLED = 0.01  # of the terms' size; independent random numbers leave more than half


class SharedB:
    """B_flat of the stored pair, divided by a power of two, and its Gram matrix.

    Attributes:
      exponent: of that power.
    """

    def __init__(self, deltas: Deltas) -> None:
        self._b = deltas.bases[1]
        self._widest = max(lam.size for lam, _ in deltas.adapter.layers.values())
        self.exponent = _exponent(self._b)
        self._rows = 0
        self._gram = np.zeros((0, 0), np.float32)

    def blocks(self, start: int, stop: int, inner: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows `start` to `stop` of B_flat's first `inner` columns, (some, inner), with places."""
        step = max(1, BLOCK // (4 * inner))
        for at in range(start, stop, step):
            part = slice(at, min(at + step, stop))
            block = self._b[part, : inner // self._b.shape[2]].astype(np.float32)
            block *= _power(-self.exponent)
            yield part, block.reshape(-1, inner)

    def gram(self, rows: int, inner: int) -> np.ndarray:
        """B_flat.T @ B_flat (inner, inner) of the first `rows` rows and `inner` columns.

        Rows are added to what was asked for before: ask for fewer first.
        """
        if rows < self._rows or not self._rows:
            self._gram = np.zeros((self._widest, self._widest), np.float32)
            self._rows = 0
        if rows > self._rows:
            for _, block in self.blocks(self._rows, rows, self._widest):
                for panel, rest in _panels(self._widest):
                    self._gram[panel, rest] += block[:, panel].T @ block[:, rest]
            for panel, rest in _panels(self._widest):
                self._gram[rest, panel] = self._gram[panel, rest].T
        self._rows = rows
        return self._gram[:inner, :inner]


class DeltaFactors:
    """One layer's M / scale, in its factors.

    Attributes:
      shape: (max, min).
      scale: what M was divided by.
      transposed: whether delta_W (out, in) is M.T.
    """

    def __init__(self, deltas: Deltas, name: str, shared: SharedB) -> None:
        n_out, n_in = deltas.layers[name].shape
        self.shape = max(n_out, n_in), min(n_out, n_in)
        self.transposed = n_out < n_in
        lam, gamma = deltas.adapter.layers[name]
        a = deltas.bases[0][:, :, : self.shape[1]]
        exponents = [_exponent(part) for part in (lam, gamma, a)]
        with np.errstate(over="ignore"):  # beyond float64: infinite
            scale = np.ldexp(deltas.adapter.config.scaling, sum(exponents) + shared.exponent)
        self.scale = float(scale)
        self._parts = [
            part.astype(np.float32) * _power(-exponent)
            for part, exponent in zip((lam, gamma, a), exponents, strict=True)
        ]
        self._inner = lam.size
        self._shared = shared

    @cached_property
    def _a_flat(self) -> np.ndarray:
        return flat_a(*self._parts)

    @property
    def _gram(self) -> np.ndarray:
        return self._shared.gram(self.shape[0], self._inner)

    def formed(self) -> np.ndarray:
        """(max, min)."""
        return self._b_times(self._a_flat)

    def times(self, x: np.ndarray) -> np.ndarray:
        """The product with x (min, k), (max, k)."""
        return self._b_times(self._a_flat @ x)

    def gram_times(self, x: np.ndarray) -> np.ndarray:
        """The product of its own Gram matrix (min, min) with x (min, k), (min, k)."""
        return self._a_flat.T @ (self._gram @ (self._a_flat @ x))

    def energy(self) -> float | None:
        """Its squared Frobenius norm, the trace of B's Gram matrix times that of A_flat.T.

        None where the terms cancel, so that their sum in float32 tells little.
        """
        gram, a, total, size = self._gram, self._a_flat, 0.0, 0.0
        for panel, rest in _panels(self._inner):
            terms = a[panel] @ a[rest].T
            terms *= gram[panel, rest]
            total += _twice_but_for(terms, PANEL)
            size += _twice_but_for(np.abs(terms, out=terms), PANEL)
        return None if total < CANCELLED * size else total

    def _b_times(self, x: np.ndarray) -> np.ndarray:
        found = np.empty((self.shape[0], x.shape[1]), np.float32)
        for part, block in self._shared.blocks(0, self.shape[0], self._inner):
            np.matmul(block, x, out=found[part])
        return found


def _panels(side: int) -> Iterator[tuple[slice, slice]]:
    """Rows of a symmetric matrix, and the columns from there on: by symmetry the others follow."""
    for start in range(0, side, PANEL):
        yield slice(start, start + PANEL), slice(start, side)


def _twice_but_for(terms: np.ndarray, columns: int) -> float:
    """Twice the sum of all terms, less that of the first columns."""
    first = terms[:, :columns].sum(dtype=np.float64)
    return float(2 * terms.sum(dtype=np.float64) - first)


def _exponent(array: np.ndarray) -> int:
    """That of the power of two next above every magnitude in an array; 0 if it holds only zeros."""
    return max(frexp(max(float(array.max()), -float(array.min())))[1], -127)


def _power(exponent: int) -> np.float32:
    return np.float32(2.0**exponent)
