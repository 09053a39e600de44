"""Drawing the bases that an adapter's file lacks: as PyTorch does from the key that it has instead.

PEFT writes such files with ``save_projection=False``, and a reader must know by which of PyTorch's
algorithms, and for a base model of which dtype, they were drawn. Our own files say so, with a
digest to check; PEFT's do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from randlora_jax.interop.adapter import Adapter, Provenance, StoredPair, bases_digest
from randlora_jax.interop.errors import AdapterFileError, shown, warn
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
    dtypes: Sequence[np.dtype],
    generation: str | None,
    where: object,
    progress: Progress = silent,
) -> DrawnPair:
    """The pair that PyTorch draws from an adapter's key, which holds no bases.

    Dense bases are drawn as `generation` says, else as the adapter's metadata does, else, with a
    warning, as torch 2.12 and later draw them. All torch releases draw sparse ones alike.

    Args:
      adapter: without bases.
      MIN, MAX: the extents that PEFT gives the pair in this base model.
      dtypes: of the base model's layers, to which PEFT casts the bases; the first one counts, but
        where the metadata has a digest, the first whose draw has it.
      generation: a `Generation` or None.
      where: the adapter's directory, or another name for it, for messages.
      progress: shows how far the draw is.

    Raises:
      AdapterFileError: the draw is not what the metadata recorded, or the bases were not PyTorch's.
      ConfigError: `generation` is none, or PyTorch has no finite bases of these extents.
    """
    config, recorded = adapter.config, adapter.provenance
    chosen = _generation(adapter, generation, where)
    for dtype in dtypes if recorded else dtypes[:1]:
        with progress("drawing PyTorch's bases", word_bytes(config.r, MIN, MAX)) as advance:
            pair = torch_bases(
                config.projection_prng_key,
                config.r,
                MIN,
                MAX,
                kind=config.kind,
                generation=chosen,
                base_dtype=dtype,
                advance=advance,
            )
        if recorded is None or bases_digest(*pair) == recorded.digest:
            return DrawnPair(pair, torch_draw(config.kind, chosen, dtype))
    assert recorded is not None
    raise AdapterFileError(
        f"{where}: the bases drawn from key {config.projection_prng_key} as "
        f"{chosen or config.kind}, for a base model in {' or '.join(map(str, dtypes))}, are not "
        f"those it was trained on (recorded as {shown(recorded.source)}, digest "
        f"{shown(recorded.digest[:16])}...): choose another {CHOOSE}, or give the base model in "
        "the dtype it was trained in"
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


def _recorded_generation(recorded: Provenance, where: object) -> Generation:
    name = recorded.source.split(":")[1]
    if name not in list(Generation):
        raise AdapterFileError(
            f"{where}: its metadata records bases drawn as {shown(recorded.source)}; expected one "
            f"of {', '.join(Generation)} after 'torch:'. A newer randlora-jax may have written "
            f"it: upgrade, or choose with {CHOOSE}"
        )
    return Generation(name)
