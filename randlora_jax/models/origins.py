"""Whose draw a pair of bases is: JAX's from a key, one of PyTorch's, or only a file's.

JAX's pairs are drawn again whenever needed. The others do not extend (PyTorch divides each by its
own standard deviation), so they are kept whole in host memory, by identity.
"""

import dataclasses
import warnings
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt

from randlora_jax.core.bases import BasisIdentity, Box, draw, in_full, jax_identity
from randlora_jax.interop.adapter import Adapter, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError
from randlora_jax.interop.torch_rng import Generation, Origin, identify, torch_bases

Pair = tuple[np.ndarray, np.ndarray]  # A (r, 1, MIN), B (MAX, N, r), as files hold them
Stored = Mapping[BasisIdentity, Pair]

_ASSUMED = Generation.BF16_24BIT


def fresh(config: RandLoraConfig, box: Box, dtype: npt.DTypeLike) -> tuple[BasisIdentity, Stored]:
    """The pair a new adapter of PEFT's extents `box` uses, and what of it must be kept.

    Args:
      dtype: of the base model's adapted kernels, to which PEFT casts PyTorch's pair.

    Raises:
      ConfigError: `config.projection_source` names no draw.
    """
    if config.projection_source == "jax":
        return jax_identity(config, box), {}
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
    return _torchs(config, generation, box, dtype)


def of_adapter(
    adapter: Adapter, box: Box, dtype: npt.DTypeLike, generation: str | None, where: object
) -> tuple[BasisIdentity, Stored, RandLoraConfig]:
    """The pair of an adapter that was read, what of it must be kept, and its config completed.

    A file that has its bases is believed. One that has none says only a key, and its bases are
    drawn as `generation`, else as its metadata says, else (with a warning) as new torch releases
    draw them; a digest in the metadata must agree.

    Raises:
      AdapterFileError: the bases must be drawn, and the draw is not what the metadata recorded.
    """
    config, recorded = adapter.config, adapter.provenance
    if adapter.bases is None:
        if generation is None and recorded is not None:
            generation = recorded.source.split(":")[1] if ":" in recorded.source else None
        if config.kind != "dense":
            generation = None
        elif generation is None:
            generation = _ASSUMED
            warnings.warn(
                f"{where} holds a key instead of its bases, and torch releases draw different ones "
                f"from it; assuming {_ASSUMED} (torch 2.12 and later). Pass torch_generation= to "
                "choose; compare an output with the model that was trained to check",
                stacklevel=6,
            )
        identity, stored = _torchs(config, generation, box, dtype)
        if recorded is not None and bases_digest(*stored[identity]) != recorded.digest:
            raise AdapterFileError(
                f"{where}: the bases drawn as {identity.source} are not those it was trained on "
                f"(digest {recorded.digest[:16]}...): pass the right torch_generation=, or load a "
                "base model of the dtype it was trained on"
            )
        return identity, stored, _sourced(config, generation)

    pair = _compact(adapter.bases[0]), _compact(adapter.bases[1])
    if recorded is not None and recorded.source == "jax":
        drawn = dataclasses.replace(
            config, projection_prng_key=recorded.projection_prng_key, projection_source="jax"
        )
        identity = jax_identity(drawn, box)
        again = in_full(identity, draw(identity, box))
        if np.array_equal(again[0], pair[0]) and np.array_equal(again[1], pair[1]):
            return identity, {}, drawn
    origin = identify(*adapter.bases, config.projection_prng_key)
    if origin is not None:
        identity = _torch_identity(config, origin, box)
        return identity, {identity: pair}, _sourced(config, origin.generation)
    digest = bases_digest(*adapter.bases)
    identity = BasisIdentity(
        f"file:{digest[:16]}", config.projection_prng_key, config.kind, config.r
    )
    return identity, {identity: pair}, config


def integers(pair: Pair) -> tuple[Pair, float]:
    """A ternary pair as -1, 0 and 1 in int8, and the unit of their products; any other as it is."""
    units = [np.abs(x).max().astype(np.float32) for x in pair]
    for x, unit in zip(pair, units, strict=True):
        if not np.isin(np.abs(x).astype(np.float32), (0, unit)).all():
            return pair, 1.0
    a, b = (np.sign(x.astype(np.float32)).astype(np.int8) for x in pair)
    return (a, b), float(units[0]) * float(units[1])


def unit(identity: BasisIdentity, stored: Stored) -> float:
    """What the product of two integers of a pair stands for; 1 where it holds no integers."""
    if identity not in stored:
        return identity.unit**2
    return 1.0 if identity.kind == "dense" else integers(stored[identity])[1]


def _torchs(
    config: RandLoraConfig, generation: str | None, box: Box, dtype: npt.DTypeLike
) -> tuple[BasisIdentity, Stored]:
    known = Generation(generation) if generation else None
    origin = Origin(config.kind, known, np.dtype(dtype))
    pair = torch_bases(
        config.projection_prng_key,
        config.r,
        box.min,
        box.max,
        kind=config.kind,
        generation=known,
        base_dtype=dtype,
    )
    identity = _torch_identity(config, origin, box)
    return identity, {identity: (_compact(pair[0]), _compact(pair[1]))}


def _torch_identity(config: RandLoraConfig, origin: Origin, box: Box) -> BasisIdentity:
    """Extents are part of it: PyTorch's pairs of one key do not extend each other."""
    source = f"torch:{origin.generation or 'sparse'}:{origin.base_dtype}:{box.max}x{box.min}"
    return BasisIdentity(source, config.projection_prng_key, origin.kind, config.r)


def _sourced(config: RandLoraConfig, generation: str | None) -> RandLoraConfig:
    source = f"torch:{generation}" if generation else "torch"
    return dataclasses.replace(config, projection_source=source)


def _compact(x: np.ndarray) -> np.ndarray:
    """`x` in bfloat16 where that loses nothing, else in float32."""
    wide = x.astype(np.float32)
    narrow = wide.astype(ml_dtypes.bfloat16)
    return narrow if np.array_equal(narrow.astype(np.float32), wide) else wide
