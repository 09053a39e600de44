"""Where an adapter's pair of bases comes from: a JAX key, PyTorch's generator, or only a file.

JAX's pairs are drawn again whenever needed. The others do not extend (PyTorch divides each by its
own standard deviation), so they are kept whole in host memory, by identity.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding

from randlora_jax.core.bases import BasisIdentity, BasisPair, Extents, draw, used_extents
from randlora_jax.interop.adapter import Adapter, StoredPair, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.missing_bases import draw_missing, refuse_in_vain, rounding_dtype
from randlora_jax.interop.peft_dir import narrowest
from randlora_jax.interop.tensor_file import pieces
from randlora_jax.interop.torch_rng import (
    Generation,
    TorchDraw,
    identify,
    torch_bases,
    torch_draw,
)

KeptPairs = Mapping[BasisIdentity, StoredPair]


def pair_extents(matrices: Iterable[tuple[int, int]], r: int) -> Extents:
    """The extents PEFT gives the pair of an adapter with these (in, out) matrices.

    PEFT takes the largest ``in`` and the largest ``out`` over all targets, then their maximum and
    minimum (``RandLoraModel._find_dim``): often far more than any layer slices.
    """
    n_in, n_out = (max(sides) for sides in zip(*matrices, strict=True))
    return used_extents((n_in, n_out), r)


def fresh(
    config: RandLoraConfig, extents: Extents, dtypes: Collection[np.dtype]
) -> tuple[BasisIdentity, KeptPairs]:
    """The pair a new adapter of PEFT's `extents` uses, and what of it must be kept.

    Args:
      dtypes: of the base model's adapted kernels, to which PEFT casts PyTorch's pair.

    Raises:
      ConfigError: `config.projection_source` names no draw.
    """
    if config.projection_source == "jax":
        return _drawn_here(config, extents), {}
    if config.projection_source == "file":
        raise ConfigError(
            "projection_source='file' describes an adapter that was loaded; a new one draws its "
            "bases: use projection_source='jax'"
        )
    generation = config.torch_generation
    if generation is None and config.kind == "dense":
        raise ConfigError(
            "projection_source='torch': PyTorch releases draw different dense bases from one key. "
            f"Name the draw: 'torch:{Generation.BF16_24BIT}' for torch 2.12 and later, "
            f"'torch:{Generation.BF16_8BIT}' for 2.2 to 2.11"
        )
    known = Generation(generation) if generation else None
    dtype = rounding_dtype(known, dtypes)
    pair = torch_bases(
        config.projection_prng_key,
        config.r,
        extents.min,
        extents.max,
        kind=config.kind,
        generation=known,
        base_dtype=dtype,
    )
    return _kept(config, torch_draw(config.kind, known, dtype), pair)


def of_adapter(
    adapter: Adapter,
    extents: Extents,
    dtypes: Collection[np.dtype],
    generation: str | None,
    base_dtype: npt.DTypeLike | None,
    where: object,
) -> tuple[BasisIdentity, KeptPairs, RandLoraConfig]:
    """The pair of an adapter that was read, what of it must be kept, and its config completed.

    A file that has its bases is believed. One that has none says only a key; see
    `interop.missing_bases` for how they are drawn.

    Args:
      dtypes: of the adapted kernels in this model.
      generation, base_dtype: what the user says of the draw, or None.

    Raises:
      AdapterFileError: the bases must be drawn, and the draw is not what the metadata recorded.
      ConfigError: `generation` or `base_dtype` is unknown, or nothing needs to be drawn.
    """
    refuse_in_vain(adapter, generation, base_dtype)
    config, recorded = adapter.config, adapter.provenance
    if adapter.bases is None:
        drawn = draw_missing(
            adapter,
            extents.min,
            extents.max,
            dtypes,
            generation,
            where,
            base_dtype=base_dtype,
        )
        return *_kept(config, drawn.draw, drawn.pair), _sourced(config, drawn.draw.generation)

    if recorded is not None and recorded.source == "jax":
        ours = dataclasses.replace(
            config, projection_prng_key=recorded.projection_prng_key, projection_source="jax"
        )
        identity = _drawn_here(ours, extents)
        again = stored_pair(identity, extents, {})
        if all(map(np.array_equal, again, map(_narrowed, adapter.bases))):
            return identity, {}, ours
    drawn_by_torch = identify(*adapter.bases, config.projection_prng_key)
    if drawn_by_torch is not None:
        kept = _kept(config, drawn_by_torch, adapter.bases)
        return *kept, _sourced(config, drawn_by_torch.generation)
    source = f"file:{bases_digest(*adapter.bases)[:16]}"
    identity = BasisIdentity(source, config.projection_prng_key, config.kind, config.r)
    return identity, {identity: _narrowed_pair(adapter.bases)}, config


def stored_pair(identity: BasisIdentity, extents: Extents, kept: KeptPairs) -> StoredPair:
    """A pair of exactly `extents`, as files hold it: A (r, 1, MIN), B (MAX, N, r)."""
    if identity in kept:
        return kept[identity]
    a, b = map(np.asarray, draw(identity, extents))
    if identity.sparsity:
        a, b = (x.astype(ml_dtypes.bfloat16) for x in (a, b))
        for x in (a, b):
            x *= ml_dtypes.bfloat16(identity.unit)  # exactly
    return a[:, None], b


def device_pair(
    identity: BasisIdentity, extents: Extents, kept: KeptPairs, sharding: NamedSharding | None
) -> BasisPair:
    """A pair of just the `extents` that layers slice, as they use it, where `sharding` says."""
    if identity not in kept:
        return draw(identity, extents, sharding)
    a, b = kept[identity] if identity.kind == "dense" else integers(kept[identity])[0]
    parts = a[:, 0, : extents.min], b[: extents.max, : extents.n]
    return BasisPair(*(jax.device_put(part, sharding) for part in parts))


def integers(pair: StoredPair) -> tuple[StoredPair, float]:
    """A ternary pair as -1, 0 and 1 in int8, and the unit of their products; any other as it is."""
    units = [max(float(np.abs(piece).max()) for piece in pieces(x)) for x in pair]
    if not all(map(_is_ternary, pair, units)):
        return pair, 1.0
    a, b = map(_signs, pair)
    return (a, b), units[0] * units[1]


def _is_ternary(x: np.ndarray, unit: float) -> bool:
    sizes = (np.abs(piece).astype(np.float32) for piece in pieces(x))
    return all(np.isin(piece, (0, unit)).all() for piece in sizes)


def _signs(x: np.ndarray) -> np.ndarray:
    found = [np.sign(piece.astype(np.float32)).astype(np.int8) for piece in pieces(x)]
    return np.concatenate(found).reshape(x.shape)


def scaling(config: RandLoraConfig, identity: BasisIdentity, kept: KeptPairs) -> float:
    """The factor on every update: alpha / r, and what the product of a pair's integers stands for.

    Raises:
      ConfigError: float32, in which updates are formed, has no such number; PEFT computes infinity.
    """
    found = config.scaling * _product_unit(identity, kept)
    if found > float(np.finfo(np.float32).max):
        raise ConfigError(
            f"randlora_alpha {config.randlora_alpha:g} and r {config.r}: expected alpha / r within "
            f"float32, in which updates are formed, found {found:g}. Use a smaller randlora_alpha; "
            "1 to 20 times r is usual"
        )
    return found


def _product_unit(identity: BasisIdentity, kept: KeptPairs) -> float:
    """What the product of two integers of a pair stands for; 1 where it holds no integers."""
    if identity not in kept:
        return identity.unit**2
    return 1.0 if identity.kind == "dense" else integers(kept[identity])[1]


def _drawn_here(config: RandLoraConfig, extents: Extents) -> BasisIdentity:
    return BasisIdentity.drawn(
        config.projection_prng_key, config.kind, config.r, smallest=extents.min
    )


def _kept(
    config: RandLoraConfig, drawn: TorchDraw, pair: StoredPair
) -> tuple[BasisIdentity, KeptPairs]:
    """Extents are part of the identity: PyTorch's pairs of one key do not extend each other."""
    a, b = pair
    identity = BasisIdentity(
        drawn.label(MAX=b.shape[0], MIN=a.shape[2]),
        config.projection_prng_key,
        drawn.kind,
        config.r,
    )
    return identity, {identity: _narrowed_pair(pair)}


def _sourced(config: RandLoraConfig, generation: str | None) -> RandLoraConfig:
    source = f"torch:{generation}" if generation else "torch"
    return dataclasses.replace(config, projection_source=source)


def _narrowed_pair(pair: StoredPair) -> StoredPair:
    a, b = pair
    return _narrowed(a), _narrowed(b)


def _narrowed(x: np.ndarray) -> np.ndarray:
    """`x` in bfloat16 where that loses nothing of float32, else as it is."""
    return x.astype(narrowest(x), copy=False)
