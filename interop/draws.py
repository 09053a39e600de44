"""Which of PyTorch's draws an adapter's bases are, and how to say so."""

from __future__ import annotations

import numpy as np
from randlora_jax.interop.adapter import BASE_DTYPES, Adapter, StoredPair, bases_digest
from randlora_jax.interop.tensor_file import pieces
from randlora_jax.interop.torch_rng import Generation, TorchDraw, is_drawn, torch_bases

_FUSED = " on processors with fused multiply-add"
_UNFUSED = " on processors without fused multiply-add"
_NO_BF16 = " where PEFT finds no bfloat16"

RELEASES = {
    Generation.BF16_8BIT: "torch 2.2 to 2.11",
    Generation.BF16_24BIT: f"torch 2.12 and later{_FUSED}",
    Generation.BF16_24BIT_NO_FMA: f"torch 2.12 and later{_UNFUSED}",
    Generation.F16_11BIT: f"torch 2.2 to 2.11{_NO_BF16}",
    Generation.F16_24BIT: f"torch 2.12 and later{_FUSED},{_NO_BF16}",
    Generation.F16_24BIT_NO_FMA: f"torch 2.12 and later{_UNFUSED},{_NO_BF16}",
}


def generations(kind: str) -> list[Generation | None]:
    """The generations that matter to bases of `kind`; sparse ones are drawn alike by all."""
    return list(Generation) if kind == "dense" else [None]


def base_dtypes(
    adapter: Adapter, generation: Generation | None, extents: tuple[int, int] | None
) -> list[np.dtype]:
    """The base models' dtypes for which PyTorch draws an adapter's bases from its key.

    Args:
      extents: MIN and MAX, where the adapter has no bases but records their digest.

    Returns:
      None of the three where this generation draws other bases.
    """
    config = adapter.config
    for dtype in BASE_DTYPES:
        draw = TorchDraw(config.kind, generation, dtype)
        if adapter.bases is not None:
            if is_drawn(*adapter.bases, config.projection_prng_key, draw):
                return agreeing_dtypes(draw, adapter.bases)
        elif adapter.provenance is not None and extents is not None:
            drawn = torch_bases(
                config.projection_prng_key,
                config.r,
                *extents,
                kind=draw.kind,
                generation=generation,
                base_dtype=dtype,
            )
            if bases_digest(*drawn) == adapter.provenance.digest:
                return agreeing_dtypes(draw, drawn)
    return []


def agreeing_dtypes(draw: TorchDraw, bases: StoredPair) -> list[np.dtype]:
    """The base models' dtypes for which `draw`'s generation draws just these `bases`."""
    if draw.base_dtype != np.float32:
        return [draw.base_dtype]
    return [dtype for dtype in BASE_DTYPES if all(_is_exact(array, dtype) for array in bases)]


def in_words(generation: Generation | None, dtypes: list[np.dtype]) -> str:
    """Such as "bf16-8bit (torch 2.2 to 2.11), base model in float32 or bfloat16"."""
    who = f"{generation} ({RELEASES[generation]})" if generation else "every torch release"
    return f"{who}, base model in {' or '.join(map(str, dtypes))}"


def _is_exact(array: np.ndarray, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):  # infinity differs as well
        numbers = (piece.astype(np.float32) for piece in pieces(array))
        return all(np.array_equal(x, x.astype(dtype).astype(np.float32)) for x in numbers)
