"""delta_W in NumPy: PEFT's arithmetic, in float32, a block at a time."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from randlora_jax.interop.adapter import BASE_DTYPES, Adapter, Bases, bases_digest
from randlora_jax.interop.base_model import BaseLayer, BaseModel
from randlora_jax.interop.errors import AdapterFileError, shown, warn
from randlora_jax.interop.torch_rng import Generation, torch_bases, word_bytes

from randlora_jax.commands.report import Misuse, progress

BLOCK = 1 << 24  # bytes of one block, of which a few exist at a time

_ASSUMED = Generation.BF16_24BIT


class Deltas:
    """delta_W of the layers of one adapter on its base model, formed when asked for.

    Attributes:
      adapter: what it was made from.
      layers: ``{name: BaseLayer}`` of every adapted layer.
      bases: the adapter's own, or PyTorch's draw where the adapter holds only their key.
    """

    def __init__(self, adapter: Adapter, base: BaseModel, generation: str | None = None) -> None:
        """Fit an adapter to a base model.

        Args:
          generation: how PyTorch drew bases that the adapter lacks, see `torch_rng.Generation`.

        Raises:
          TargetError: the base model has other layers.
          AdapterFileError: the bases are of other sizes, or the draw is not the recorded one.
          Misuse: `generation` is given for an adapter that has its bases.
        """
        self.adapter = adapter
        self.layers = base.layers(adapter)
        self.bases = _bases(adapter, self.layers.values(), generation, base.folder)

    def of(self, name: str) -> np.ndarray:
        """delta_W of a layer, (out, in) in float32, scaling included."""
        layer = self.layers[name]
        found = np.zeros(layer.tensor.shape, np.float32)
        self.add_to(name, found)
        return found.T if layer.conv1d else found

    def add_to(self, name: str, weight: np.ndarray) -> None:
        """Add delta_W to a layer's weight as the base model stores it, in place.

        The sum is formed in float32 (float64 if the weight is) and rounded once. Memory besides:
        A_flat, min(in, out) squared numbers, and some blocks.
        """
        lam, gamma = self.adapter.layers[name]
        a, b = self.bases
        r, n = lam.shape
        smallest = gamma.shape[1]
        a_flat = lam[:, :, None] * a[:, :, :smallest].astype(np.float32) * gamma
        a_flat = a_flat.reshape(r * n, smallest)
        n_out, n_in = self.layers[name].shape
        matrix = weight.T if self.layers[name].conv1d else weight  # (out, in)
        matrix = matrix if n_in <= n_out else matrix.T  # (max, min), as M
        rows = max(1, BLOCK // (4 * max(r * n, smallest)))
        for start in range(0, max(n_out, n_in), rows):
            part = slice(start, min(start + rows, max(n_out, n_in)))
            b_flat = b[part, :n].astype(np.float32).reshape(-1, n * r)
            block = b_flat @ a_flat
            block *= self.adapter.config.scaling
            wide = np.promote_types(weight.dtype, np.float32)
            with np.errstate(over="ignore"):  # what overflows float16 becomes inf, for all to see
                matrix[part] = (matrix[part].astype(wide) + block).astype(weight.dtype)


def _bases(
    adapter: Adapter, layers: Collection[BaseLayer], generation: str | None, where: Path
) -> Bases:
    """The adapter's bases, which must be just as large as PEFT wants them for these layers."""
    sides = [max(sides) for sides in zip(*(layer.shape for layer in layers), strict=True)]
    box = max(sides), min(sides)
    if adapter.bases is None:
        stored = next(iter(layers)).tensor.dtype
        return _drawn(adapter, box, generation, stored)
    if generation is not None:
        raise Misuse(f"the adapter holds its bases: they are not drawn as {generation}")
    found = adapter.bases[1].shape[0], adapter.bases[0].shape[2]
    if found != box:
        raise AdapterFileError(
            f"the adapter's bases have (MAX, MIN) = {found}, its layers in {where} need {box}: "
            "another base model, or tensors of some layers are missing from the adapter"
        )
    return adapter.bases


def _drawn(
    adapter: Adapter, box: tuple[int, int], generation: str | None, stored: np.dtype
) -> Bases:
    """PyTorch's bases for the adapter's key; those it was trained on, where it records which.

    PEFT casts them to the dtype the base model is loaded in. That is the dtype it is `stored` in,
    unless the adapter's record says otherwise.
    """
    config, recorded = adapter.config, adapter.provenance
    if config.kind != "dense":
        generation = None
    elif generation is None and recorded is not None and ":" in recorded.source:
        generation = recorded.source.split(":")[1]
    elif generation is None:
        generation = _ASSUMED
        warn(
            "the adapter holds a key instead of its bases, and torch releases draw different ones "
            f"from it; assuming {_ASSUMED} (torch 2.12 and later). --torch-generation chooses; "
            "compare an output with the model that was trained to check"
        )
    for dtype in dict.fromkeys((stored, *BASE_DTYPES)) if recorded else (stored,):
        extents = config.r, box[1], box[0]
        with progress("drawing PyTorch's bases", word_bytes(*extents)) as advance:
            bases = torch_bases(
                config.projection_prng_key,
                *extents,
                kind=config.kind,
                generation=generation,
                base_dtype=dtype,
                advance=advance,
            )
        if recorded is None or bases_digest(*bases) == recorded.digest:
            return bases
    assert recorded is not None
    raise AdapterFileError(
        f"the bases drawn from key {config.projection_prng_key} as {generation or config.kind} are "
        f"not those the adapter was trained on (digest {shown(recorded.digest[:16])}...): choose "
        "another --torch-generation"
    )
