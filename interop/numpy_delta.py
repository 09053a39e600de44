"""delta_W in NumPy: PEFT's arithmetic, in float32, a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
from randlora_jax.interop.adapter import Adapter, StoredPair
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.missing_bases import draw_missing, refuse_in_vain
from randlora_jax.interop.progress import Progress, silent
from randlora_jax.interop.torch_rng import TorchDraw

BLOCK = 1 << 24  # bytes of one block, of which a few exist at a time


class Deltas:
    """delta_W of the layers of one adapter on its base model, formed when asked for.

    Attributes:
      adapter: what it was made from.
      layers: ``{name: BaseLayer}`` of every adapted layer.
      bases: the adapter's own, or PyTorch's draw where the adapter holds only their key.
      draw: which draw of PyTorch's; None where the adapter holds its bases.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: BaseModel,
        generation: str | None = None,
        progress: Progress = silent,
        *,
        base_dtype: str | None = None,
    ) -> None:
        """Fit an adapter to a base model.

        Args:
          generation: how PyTorch drew bases that the adapter lacks, see `torch_rng.Generation`.
          progress: shows how far a draw is.
          base_dtype: the dtype that the base model was loaded in for training, to which PEFT casts
            such bases; None: as the adapter's record says, else as its layers are stored.

        Raises:
          TargetError: the base model has other layers.
          AdapterFileError: the bases are of other sizes, or the draw is not the recorded one.
          ConfigError: `generation` or `base_dtype` is unknown, or given for an adapter that has its
            bases.
        """
        self.adapter = adapter
        self.layers = base.layers(adapter)
        self.draw: TorchDraw | None = None
        refuse_in_vain(adapter, generation, base_dtype)
        shapes = [layer.shape for layer in self.layers.values()]
        MIN, MAX = sorted(max(sides) for sides in zip(*shapes, strict=True))
        if adapter.bases is None:
            drawn = draw_missing(
                adapter,
                MIN,
                MAX,
                {layer.tensor.dtype for layer in self.layers.values()},
                generation,
                "the adapter",
                progress,
                base_dtype=base_dtype,
            )
            self.bases, self.draw = drawn.pair, drawn.draw
            return
        _check_extents(adapter.bases, MAX, MIN, base.folder)
        self.bases = adapter.bases

    def let_go(self) -> None:
        """Forget what of the bases no layer uses, often most: PEFT sizes them for any layer.

        Their arrays are changed in place, for a copy would be held beside the whole: only for who
        has no other use for the adapter that was read.
        """
        gammas = (gamma.shape for _, gamma in self.adapter.layers.values())
        n, smallest = map(max, zip(*gammas, strict=True))
        largest = max(max(layer.shape) for layer in self.layers.values())
        self.adapter = replace(self.adapter, bases=None)
        a, b = self.bases
        self.bases = _cut(a, *a.shape[:2], smallest), _cut(b, largest, n, b.shape[2])

    def of(self, name: str) -> np.ndarray:
        """delta_W of a layer, (out, in) in float32, scaling included.

        Raises:
          AdapterFileError: it is beyond float32.
        """
        layer = self.layers[name]
        found = np.zeros(layer.stored.shape, np.float32)
        self.add_to(name, found)
        if not (np.isfinite(found.min()) and np.isfinite(found.max())):
            raise too_strong(self.adapter, name)
        return found.T if layer.stored.transposed else found

    def add_to(self, name: str, weight: np.ndarray) -> None:
        """Add delta_W to a layer's weight as the base model stores it, in place: `adding`."""
        self.adding(name)(weight, 0)

    @np.errstate(over="ignore", invalid="ignore")  # what overflows is infinite, for all to see
    def adding(self, name: str) -> Callable[[np.ndarray, int], None]:
        """What adds delta_W to some rows of a layer's weight as the base model stores it, in place.

        It takes the rows and the number of the first. The sum is formed in float32 (float64 if the
        weight is) and rounded once. Memory besides: A_flat, min(in, out) squared numbers, and some
        blocks.
        """
        lam, gamma = self.adapter.layers[name]
        a, b = self.bases
        r, n = lam.shape
        smallest = gamma.shape[1]
        a_flat = flat_a(lam, gamma, a[:, :, :smallest])
        n_out, n_in = self.layers[name].shape
        # whether the weight lies as M (max, min) does, or transposed
        lies_as_m = (n_in <= n_out) != self.layers[name].stored.transposed
        step = max(1, BLOCK // (4 * max(r * n, smallest)))

        @np.errstate(over="ignore", invalid="ignore")
        def add(rows: np.ndarray, start: int) -> None:
            stop = start + len(rows)
            sum_dtype = np.promote_types(rows.dtype, np.float32)
            first, last = (start, stop) if lies_as_m else (0, max(n_out, n_in))
            for at in range(first, last, step):
                part = slice(at, min(at + step, last))
                b_flat = b[part, :n].astype(np.float32).reshape(-1, n * r)
                if lies_as_m:
                    block, place = b_flat @ a_flat, rows[at - start : part.stop - start]
                else:  # so that the sum runs along memory: across it takes ten times as long
                    block, place = a_flat[:, start:stop].T @ b_flat.T, rows[:, part]
                block *= self.adapter.config.scaling
                block = block.astype(sum_dtype, copy=False)
                block += place
                place[...] = block
                del b_flat, block  # or they lie beside the next

        return add


def _cut(array: np.ndarray, *sides: int) -> np.ndarray:
    """An array's leading part of these sides, moved to its front so that the rest can go."""
    part = array[tuple(map(slice, sides))]
    if part.shape == array.shape or not (array.flags.owndata and array.flags.c_contiguous):
        return part if part.shape == array.shape else part.copy()
    items, size = array.reshape(-1), prod(sides[1:])
    for row, kept in enumerate(part):  # each lies at or behind where it goes
        items[row * size : (row + 1) * size] = kept.reshape(-1)
    del part, items, kept
    array.resize(sides, refcheck=False)
    return array


def flat_a(lam: np.ndarray, gamma: np.ndarray, a: np.ndarray) -> np.ndarray:
    """A_flat (r * n, min), rank slow and basis fast, of A (r, 1, min)."""
    product = lam[:, :, None] * a.astype(np.float32)
    product *= gamma
    return product.reshape(-1, product.shape[2])


def too_strong(adapter: Adapter, name: str) -> AdapterFileError:
    """The error of a layer whose delta_W float32 cannot hold."""
    return AdapterFileError(
        f"{shown(name)}: delta_W is too large for float32, with randlora_alpha "
        f"{adapter.config.randlora_alpha:g} and r {adapter.config.r}. Training diverged, or "
        "adapter_config.json was changed; use an earlier save, or a smaller randlora_alpha"
    )


def _check_extents(pair: StoredPair, MAX: int, MIN: int, where: Path) -> None:
    """PEFT opens bases of just the size it wants for the adapted layers."""
    found = pair[1].shape[0], pair[0].shape[2]
    if found != (MAX, MIN):
        raise AdapterFileError(
            f"the adapter's bases have (MAX, MIN) = {found}, its layers in {where} need "
            f"{(MAX, MIN)}: another base model, or tensors of some layers are missing from the "
            "adapter"
        )
