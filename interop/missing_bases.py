"""Drawing the bases that an adapter's file lacks: as PyTorch does from the key that it has instead.

PEFT writes such files with ``save_projection=False``, and a reader must know by which of PyTorch's
algorithms, and for a base model of which dtype, they were drawn. Our own files say so, with a
digest to check; PEFT's do not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt
from randlora_jax.interop.adapter import (
    BASE_DTYPES,
    Adapter,
    Provenance,
    StoredPair,
    bases_digest,
)
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError, shown, warn
from randlora_jax.interop.progress import Progress, silent
from randlora_jax.interop.torch_rng import (
    Generation,
    TorchDraw,
    torch_bases,
    torch_draw,
    word_bytes,
)

ASSUMED = Generation.BF16_24BIT
CHOOSE = "torch_generation= or, on the command line, --torch-generation"
_F32, _F16, _BF16 = map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16))
CHOOSE_DTYPE = "base_dtype= or, on the command line, --base-dtype"


@dataclass(frozen=True)
class DrawnPair:
    """A pair of bases that PyTorch draws, and how."""

    pair: StoredPair
    draw: TorchDraw

    def provenance(self, key: int, shapes: dict[str, tuple[int, int]]) -> Provenance:
        """What to record of the pair, drawn from `key`, for layers of these (out, in)."""
        a, b = self.pair
        label = self.draw.label(b.shape[0], a.shape[2])
        return Provenance(label, key, self.draw.kind, bases_digest(a, b), shapes)


def draw_missing(
    adapter: Adapter,
    MIN: int,
    MAX: int,
    dtypes: Collection[np.dtype],
    generation: str | None,
    where: object,
    progress: Progress = silent,
    *,
    base_dtype: npt.DTypeLike | None = None,
) -> DrawnPair:
    """The pair that PyTorch draws from an adapter's key, which holds no bases.

    Dense bases are drawn as `generation` says, else as the adapter's metadata does, else, with a
    warning, as torch 2.12 and later draw them. All torch releases draw sparse ones alike. PEFT
    rounds them to the dtype that the base model was loaded in: `base_dtype`, else the one that the
    metadata's digest tells, else, with a warning where it matters, as `rounding_dtype` has it.

    Args:
      adapter: without bases.
      MIN, MAX: the extents that PEFT gives the pair in this base model.
      dtypes: of the base model's adapted layers.
      generation: a `Generation` or None.
      where: the adapter's directory, or another name for it, for messages.
      progress: shows how far the draw is.
      base_dtype: float32, float16 or bfloat16, or None.

    Raises:
      AdapterFileError: the draw is not what the metadata recorded, the bases were not PyTorch's, or
        they depend on which of `dtypes` comes first in the model.
      ConfigError: `generation` or `base_dtype` is none, or PyTorch has no finite bases of these
        extents.
    """
    config, recorded = adapter.config, adapter.provenance
    chosen = _generation(adapter, generation, where)
    likeliest = rounding_dtype(chosen, dtypes)
    tried = [likeliest, *(x for x in BASE_DTYPES if recorded and x != likeliest)]
    if base_dtype is not None:
        tried = [_known_dtype(base_dtype)]
    elif recorded is None:
        _warn_of_dtype(TorchDraw(config.kind, chosen, likeliest), where)
        if config.kind != "dense" and {_F16, _BF16} <= set(dtypes):
            by_way = _drawn(config, MIN, MAX, chosen, _F16, progress)
            _refuse_order(by_way, _drawn(config, MIN, MAX, chosen, _BF16, progress), where)
    for dtype in tried:
        pair = _drawn(config, MIN, MAX, chosen, dtype, progress)
        if recorded is None or bases_digest(*pair) == recorded.digest:
            return DrawnPair(pair, torch_draw(config.kind, chosen, dtype))
    assert recorded is not None
    raise AdapterFileError(
        f"{where}: the bases drawn from key {config.projection_prng_key} as "
        f"{chosen or config.kind}, for a base model in {' or '.join(map(str, tried))}, are not "
        f"those it was trained on (recorded as {shown(recorded.source)}, digest "
        f"{shown(recorded.digest[:16])}...): choose another {CHOOSE}, or the dtype that the base "
        f"model was trained in: {CHOOSE_DTYPE}"
    )


def rounding_dtype(generation: Generation | None, dtypes: Collection[npt.DTypeLike]) -> np.dtype:
    """Of the dtypes of a model's adapted layers, the one that decides what its bases are.

    PEFT's layers share one pair, and each casts it to its own dtype: the coarsest lasts, in
    whatever order they come. Dense bases are drawn in one kind of 16 bits, which rounds them no
    more, nor what the other kind leaves of them. Sparse ones may come to bfloat16 by way of float16
    otherwise than at once: `draw_missing` refuses those. PEFT casts to no integers, and float64
    rounds nothing.

    Args:
      generation: None for sparse bases.
    """
    found = {np.dtype(dtype) for dtype in dtypes}
    drawn_in = generation and generation.dtype
    coarsest_first = (_F16, _BF16) if drawn_in == _BF16 else (_BF16, _F16)
    return next((dtype for dtype in coarsest_first if dtype in found), _F32)


def _refuse_order(by_way: StoredPair, at_once: StoredPair, where: object) -> None:
    """Refuse ternary bases that bfloat16 has otherwise by way of float16 than at once."""
    for name, *both in zip("AB", by_way, at_once, strict=True):
        one, other = (float(max(x.max(), -x.min())) for x in both)
        if float(np.float32(one).astype(_BF16)) != other:
            raise AdapterFileError(
                f"{where} holds a key instead of its bases, and adapts layers in float16 and in "
                "bfloat16: PEFT rounds the bases to each in turn, and an entry of randlora_"
                f"{name} is {float(np.float32(one).astype(_BF16))} if float16 comes first, else "
                f"{other}, which no file tells. Save the adapter with its bases "
                f"(save_projection=True); or, if it was trained in one dtype, say it: "
                f"{CHOOSE_DTYPE}"
            )


def _drawn(
    config: RandLoraConfig,
    MIN: int,
    MAX: int,
    generation: Generation | None,
    dtype: np.dtype,
    progress: Progress,
) -> StoredPair:
    with progress("drawing PyTorch's bases", word_bytes(config.r, MIN, MAX)) as advance:
        return torch_bases(
            config.projection_prng_key,
            config.r,
            MIN,
            MAX,
            kind=config.kind,
            generation=generation,
            base_dtype=dtype,
            advance=advance,
        )


def refuse_in_vain(adapter: Adapter, generation: object, base_dtype: object) -> None:
    """Refuse to be told how the bases were drawn of an adapter that holds them.

    Raises:
      ConfigError: one of the two is not None, and the adapter has its bases.
    """
    for told, given in (("torch_generation", generation), ("base_dtype", base_dtype)):
        if given is not None and adapter.bases is not None:
            raise ConfigError(
                f"{told} {shown(str(given))}: the adapter holds its bases, so that nothing is "
                "drawn; leave it out"
            )


def _generation(adapter: Adapter, given: str | None, where: object) -> Generation | None:
    """Which algorithm draws dense bases: the given one, the recorded one or the newest."""
    recorded = adapter.provenance
    if recorded is not None and not recorded.source.startswith("torch"):
        raise AdapterFileError(
            f"{where}: expected bases in the file, since PyTorch cannot draw those of "
            f"{shown(recorded.source)}; found none. Save the adapter again with its bases"
        )
    chosen = None if given is None else Generation(given)  # which refuses what is none
    if adapter.config.kind != "dense":
        return None
    if chosen is not None:
        return chosen
    if recorded is not None and ":" in recorded.source:
        return _recorded_generation(recorded, where)
    warn(
        f"{where} holds a key instead of its bases, and torch releases draw different ones from "
        f"it; assuming {ASSUMED} (torch 2.12 and later). {CHOOSE} chooses; compare an output with "
        "the model that was trained to check"
    )
    return ASSUMED


def _known_dtype(given: npt.DTypeLike) -> np.dtype:
    try:
        if np.dtype(given) in BASE_DTYPES:
            return np.dtype(given)
    except (TypeError, ValueError):
        pass
    raise ConfigError(
        f"base_dtype {shown(given)}: expected the dtype that the base model was loaded in for "
        f"training, one of {', '.join(map(str, BASE_DTYPES))}"
    )


def _warn_of_dtype(draw: TorchDraw, where: object) -> None:
    """Say that the dtype is assumed, where another one would give other bases."""
    known = torch_draw(*draw)
    if known.kind == "dense" and known.base_dtype == np.float32:
        return
    warn(
        f"{where} holds a key instead of its bases, and PEFT rounds {draw.kind} ones to the dtype "
        f"that the base model was loaded in for training; assuming {draw.base_dtype}, its dtype "
        f"here. {CHOOSE_DTYPE} chooses; compare an output with the model that was trained to check"
    )


def _recorded_generation(recorded: Provenance, where: object) -> Generation:
    name = recorded.source.split(":")[1]
    if name not in list(Generation):
        raise AdapterFileError(
            f"{where}: its metadata records bases drawn as {shown(recorded.source)}; expected one "
            f"of {', '.join(Generation)} after 'torch:'. A newer randlora-jax may have written "
            f"it: upgrade, or choose with {CHOOSE}"
        )
    return Generation(name)
