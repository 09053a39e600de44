"""One adapter in host memory, in PEFT's own names and layout, and what makes it sound."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, listed, shown
from randlora_jax.interop.strict_json import parse_object
from randlora_jax.interop.tensor_file import pieces

BASE_DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
FORMAT_VERSION = 1

StoredPair = tuple[np.ndarray, np.ndarray]
"""A (r, 1, MIN) and B (MAX, N, r), as files hold a pair of bases."""


@dataclass(frozen=True)
class Provenance:
    """What this library records beside the tensors; PEFT's readers pass it by.

    Attributes:
      source: whose draw the bases are: ``"jax"``, ``"torch..."`` (with its generation) or
        ``"file..."`` (they came with a file and nobody can draw them again).
      projection_prng_key: the key they were drawn from. Where the source is not PyTorch it
        differs from the one in adapter_config.json, see `derived_key`.
      kind: ``"dense"``, ``"sparse"`` or ``"very_sparse"``.
      digest: `bases_digest` of the bases with PEFT's extents.
      shapes: ``{layer: (out, in)}`` of every adapted layer; empty where they are unknown, since
        PEFT's own files do not tell them.
    """

    source: str
    projection_prng_key: int
    kind: str
    digest: str
    shapes: dict[str, tuple[int, int]]

    def to_json(self) -> str:
        """One line of JSON, for the file's metadata."""
        return json.dumps({"version": FORMAT_VERSION, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> Provenance:
        """The reverse of `to_json`; `where` names the file in errors.

        Raises:
          AdapterFileError: not what `to_json` writes, naming the field, or written by a later
            version.
        """
        values = parse_object(text, where)
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise AdapterFileError(
                f"{where}: expected version {FORMAT_VERSION}, found {shown(version)}. A "
                "newer randlora-jax may have written it: upgrade"
            )
        expected = {"source": str, "projection_prng_key": int, "kind": str, "digest": str}
        if values.keys() != {*expected, "shapes"} or any(
            type(values[name]) is not kind for name, kind in expected.items()
        ):
            raise AdapterFileError(
                f"{where}: expected {', '.join(expected)} and shapes, found "
                f"{shown(text)}. Save the adapter again, or remove this metadata"
            )
        shapes = values.pop("shapes")
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise AdapterFileError(f"{where}: shapes must give [out, in] for every layer")
        for name, (is_sound, what) in _SOUND.items():
            if not is_sound(values[name]):
                raise AdapterFileError(
                    f"{where}: {name}: expected {what}, found {shown(values[name])}. The file was "
                    "damaged: fetch it again"
                )
        return cls(**values, shapes={name: (out, in_) for name, (out, in_) in shapes.items()})


_SOUND: dict[str, tuple[Callable[[Any], object], str]] = {
    "source": (re.compile(r"(jax|torch|file)(:.*)?").fullmatch, "jax, torch:... or file:..."),
    "projection_prng_key": (lambda key: -(2**63) <= key < 2**64, "a key of 64 bits"),
    "kind": (("dense", "sparse", "very_sparse").__contains__, "dense, sparse or very_sparse"),
    "digest": (re.compile(r"[0-9a-f]{64}").fullmatch, "64 hexadecimal digits"),
}


@dataclass
class Adapter:
    """One adapter, as its directory holds it.

    Attributes:
      config: as in adapter_config.json, its key included.
      layers: ``{PyTorch module path: (lambda (r, n), gamma (n, min))}``, float32.
      saved: every other tensor by its PyTorch state-dict key, such as ``classifier.weight``,
        in the file's dtype. The bias of an adapted layer is ``<layer>.base_layer.bias``. With
        ``bias="all"`` and ``modules_to_save`` PEFT writes the frozen module's bias as well, as
        ``<module>.original_module.bias``: the base model's own, which no output depends on.
      bases: A (r, 1, MIN) and B (MAX, N, r) in float32, float16 or bfloat16; None where the
        file has none and they must be drawn from the key as PyTorch does.
      provenance: what this library recorded, or None.
    """

    config: RandLoraConfig
    layers: dict[str, tuple[np.ndarray, np.ndarray]]
    saved: dict[str, np.ndarray] = field(default_factory=dict)
    bases: StoredPair | None = None
    provenance: Provenance | None = None


def bases_digest(A: np.ndarray, B: np.ndarray) -> str:
    """SHA-256, in hex, of a base pair's numbers and shapes, whatever dtype holds them.

    The bytes: for A, then B, its shape as ASCII text such as ``4x1x16`` and a newline, then its
    items in C order as little-endian float32. Memory: one small piece.
    """
    digest = hashlib.sha256()
    for array in (A, B):
        digest.update("x".join(map(str, array.shape)).encode() + b"\n")
        for piece in pieces(array):
            digest.update(piece.astype("<f4").data)
    return digest.hexdigest()


def derived_key(digest: str) -> int:
    """The key to record for bases that PyTorch did not draw: 62 bits of their digest.

    PEFT takes equal keys for equal bases and refuses to hold different keys in one model, so
    bases of ours under a key of their own are refused beside others, never mixed with them.
    """
    return int(digest[:16], 16) >> 2


def check(adapter: Adapter, where: object) -> None:
    """Check that an adapter's parts fit each other, as PEFT's arithmetic needs them.

    Raises:
      AdapterFileError: naming `where`, the tensor, what was expected and what was found.
    """
    if not adapter.layers:
        raise AdapterFileError(
            f"{where}: expected randlora_lambda and randlora_gamma of at least one layer, found "
            "none: this is no RandLoRA adapter, or nothing was targeted when it was saved"
        )
    _check_layers(adapter, where)
    if adapter.bases is not None:
        _check_pair(adapter, adapter.bases, where)
    if adapter.provenance is not None and adapter.provenance.shapes:
        _check_recorded_shapes(adapter, adapter.provenance.shapes, where)


def _check_layers(adapter: Adapter, where: object) -> None:
    r = adapter.config.r
    for name, (lam, gamma) in adapter.layers.items():
        for part, array in (("lambda", lam), ("gamma", gamma)):
            key = f"{name}.randlora_{part}"
            _expect(array.dtype == np.float32, where, key, "float32", array.dtype)
            _expect(array.ndim == 2 and array.size > 0, where, key, "a matrix", array.shape)
        smallest = gamma.shape[1]
        n = -(-smallest // r)
        for part, array, shape in (("gamma", gamma, (n, smallest)), ("lambda", lam, (r, n))):
            _expect(array.shape == shape, where, f"{name}.randlora_{part}", shape, array.shape)


def _check_pair(adapter: Adapter, pair: StoredPair, where: object) -> None:
    r, (a, b) = adapter.config.r, pair
    for key, array in (("randlora_A", a), ("randlora_B", b)):
        sound = array.dtype in BASE_DTYPES
        _expect(sound, where, key, "float32, float16 or bfloat16", array.dtype)
    sound = a.ndim == 3 and a.shape[:2] == (r, 1)
    _expect(sound, where, "randlora_A", f"({r}, 1, MIN)", a.shape)
    MIN = a.shape[2]
    name = max(adapter.layers, key=lambda name: adapter.layers[name][1].shape[1])
    needed = adapter.layers[name][1].shape[1]
    expected = f"(r, 1, {needed} or more) for {shown(name)}"
    _expect(needed <= MIN, where, "randlora_A", expected, a.shape)
    n = -(-MIN // r)
    sound = b.ndim == 3 and b.shape[0] >= MIN and b.shape[1:] == (n, r)
    _expect(sound, where, "randlora_B", f"({MIN} or more, {n}, {r})", b.shape)


def _check_recorded_shapes(
    adapter: Adapter, shapes: Mapping[str, tuple[int, int]], where: object
) -> None:
    """Check that the shapes in the metadata are those of the tensors."""
    _expect(
        shapes.keys() == adapter.layers.keys(),
        where,
        "shapes in the metadata",
        "those of the adapted layers",
        f"other layers: {listed(sorted(shapes.keys() ^ adapter.layers.keys()))}",
    )
    for name, shape in shapes.items():
        smallest = adapter.layers[name][1].shape[1]
        key = f"{name}.randlora_gamma"
        _expect(min(shape) == smallest, where, key, min(shape), smallest)
    if adapter.bases is not None:
        # PEFT sizes the bases by the largest out and in of all layers, and accepts no other
        extents = [max(sides) for sides in zip(*shapes.values(), strict=True)]
        expected = sorted(extents, reverse=True)
        found = [adapter.bases[1].shape[0], adapter.bases[0].shape[2]]
        _expect(expected == found, where, "randlora_B, randlora_A", expected, found)


def _expect(sound: bool, where: object, key: str, expected: object, found: object) -> None:
    if not sound:
        raise AdapterFileError(
            f"{where}: {shown(key)}: expected {expected}, found {found}. The adapter was "
            "damaged, or its config belongs to another; fetch both files again"
        )


def check_finite(adapter: Adapter, where: object) -> None:
    """Refuse NaN and infinity anywhere in an adapter.

    Raises:
      AdapterFileError: naming the tensor and how many of its numbers are not finite.
    """
    for key, bad, count in not_finite(adapter):
        raise AdapterFileError(
            f"{where}: {shown(key)}: expected finite numbers, found {bad} of {count} NaN or "
            "infinite: training diverged or the file was damaged; use an earlier save"
        )


def not_finite(adapter: Adapter) -> Iterator[tuple[str, int, int]]:
    """Each tensor with NaN or infinity in it: its name, how many, and how many numbers it has."""
    arrays = dict(adapter.saved)
    for name, (lam, gamma) in adapter.layers.items():
        arrays |= {f"{name}.randlora_lambda": lam, f"{name}.randlora_gamma": gamma}
    if adapter.bases is not None:
        arrays |= dict(zip(("randlora_A", "randlora_B"), adapter.bases, strict=True))
    for key, array in arrays.items():
        if array.dtype.kind not in "biu":
            bad = array.size - sum(int(np.count_nonzero(np.isfinite(x))) for x in pieces(array))
            if bad:
                yield key, bad, array.size


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and side > 0 for side in value)
    )
