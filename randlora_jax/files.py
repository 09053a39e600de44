"""Between a model's adapter and its PEFT directory: names, layouts, whose the bases are."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from randlora_jax import names, targets
from randlora_jax.bases import BasisIdentity, Box, draw, jax_identity, used_box
from randlora_jax.book import AdapterState, Book
from randlora_jax.config import RandLoraConfig
from randlora_jax.errors import AdapterFileError, TargetError, nearest
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.peft_dir import read_adapter
from randlora_jax.layers import AdapterSpec
from randlora_jax.names import Path

Pair = tuple[np.ndarray, np.ndarray]  # A (r, 1, MIN), B (MAX, N, r), as files hold them


def export(book: Book, adapter_name: str, state: AdapterState) -> Adapter:
    """An adapter in PEFT's names and layouts, in host memory.

    Raises:
      TargetError: a leaf has no PyTorch name.
    """
    spec, config = book.specs[adapter_name], book.configs[adapter_name]
    for name in state.layers:
        if book.layers[name].stack:
            raise TargetError(
                f"layer {name!r} stacks {book.layers[name].stack} PyTorch layers in one array, and "
                "no rule says how those are named"
            )
    bases = peft_pair(book, spec)
    if book.origin.model_type and not (config.base_model_name_or_path or book.origin.name_or_path):
        warnings.warn(
            "base_model_name_or_path is unknown, so PEFT's Auto classes will not find the base "
            "model of this adapter; give it in RandLoraConfig",
            stacklevel=4,
        )
    written = dataclasses.replace(
        config,
        target_modules=targets.write_targets(list(state.layers), book.modules),
        layers_to_transform=None,  # target_modules says all
        layers_pattern=None,
        modules_to_save=targets.saved_modules(config) or None,
        fan_in_fan_out=any(book.layers[name].fan_in_fan_out for name in state.layers),
        base_model_name_or_path=config.base_model_name_or_path or book.origin.name_or_path,
        auto_mapping=config.auto_mapping
        or (None if config.task_type else book.origin.auto_mapping),
        inference_mode=True,
    )
    return Adapter(
        config=written,
        layers={
            k: (np.asarray(lam), np.asarray(gamma)) for k, (lam, gamma) in state.layers.items()
        },
        saved={
            _saved_key(path, state): names.to_torch(
                value, path, book.layers.get(names.dotted(path[:-1]))
            )
            for path, value in state.saved.items()
        },
        bases=bases,
        provenance=Provenance(
            source=spec.identity.source,
            projection_prng_key=spec.identity.key,
            kind=spec.identity.kind,
            digest=bases_digest(*bases),
            shapes={name: book.layers[name].matrix[::-1] for name in state.layers},
        ),
    )


def _saved_key(path: Path, state: AdapterState) -> str:
    key = names.torch_key(path)
    if names.dotted(path[:-1]) in state.layers:  # PEFT's wrapper holds the layer one level down
        module, leaf = key.rsplit(".", 1)
        return f"{module}.base_layer.{leaf}"
    return key


def peft_pair(book: Book, spec: AdapterSpec) -> Pair:
    """The adapter's pair with exactly the extents PEFT expects in a file."""
    if spec.identity in book.stored:
        return book.stored[spec.identity]
    pair = draw(spec.identity, spec.box)
    return np.asarray(pair.A)[:, None], np.asarray(pair.B)


def restore(
    book: Book, base: Mapping[Path, jax.Array], directory: str | FilePath, adapter_name: str
) -> tuple[AdapterSpec, RandLoraConfig, AdapterState, dict[BasisIdentity, Pair]]:
    """Reads an adapter directory and fits it to a model; changes nothing.

    Returns:
      the adapter's spec, config and state, and its bases where only the file has them.

    Raises:
      AdapterFileError: the files are damaged, or hold other tensors than their config asks for.
      TargetError: the adapter's layers and the model's do not fit together.
    """
    adapter = read_adapter(directory)
    _check_layers(book, adapter, directory)
    if adapter.bases is None:
        raise AdapterFileError(
            f"{directory} holds no bases (save_projection=False): they would have to be drawn as "
            "the PyTorch that trained it did; save it again with save_projection=True"
        )
    identity, stored = _identify(adapter)
    box = Box(adapter.bases[1].shape[0], adapter.bases[1].shape[1], adapter.bases[0].shape[2])
    config = dataclasses.replace(
        adapter.config,
        projection_source="file" if stored else "jax",
        projection_prng_key=adapter.config.projection_prng_key if stored else identity.key,
    )
    spec = AdapterSpec(adapter_name, config.scaling, config.randlora_dropout, identity, box)
    saved = _saved_leaves(book, base, adapter, directory)
    layers = {
        k: (jnp.asarray(lam), jnp.asarray(gamma)) for k, (lam, gamma) in adapter.layers.items()
    }
    return spec, config, AdapterState(layers, saved), stored


def _identify(adapter: Adapter) -> tuple[BasisIdentity, dict[BasisIdentity, Pair]]:
    """Whose bases a file holds: ones we can draw (then nothing needs storing), or its own."""
    assert adapter.bases is not None
    kind, r, key = adapter.config.kind, adapter.config.r, adapter.config.projection_prng_key
    a, b = map(_compact, adapter.bases)
    origin = adapter.provenance
    if origin is not None and origin.source == "jax":
        box = Box(b.shape[0], b.shape[1], a.shape[2])
        drawn = dataclasses.replace(
            adapter.config, projection_prng_key=origin.projection_prng_key, projection_source="jax"
        )
        identity = jax_identity(drawn, box)
        pair = draw(identity, box)
        if np.array_equal(np.asarray(pair.A), a[:, 0]) and np.array_equal(np.asarray(pair.B), b):
            return identity, {}
    digest = bases_digest(*adapter.bases)
    identity = BasisIdentity(f"file:{digest[:16]}", key, kind, r)
    return identity, {identity: (a, b)}


def _compact(x: np.ndarray) -> np.ndarray:
    """`x` in bfloat16 where that loses nothing, else in float32."""
    wide = x.astype(np.float32)
    narrow = wide.astype(ml_dtypes.bfloat16)
    return narrow if np.array_equal(narrow.astype(np.float32), wide) else wide


def _check_layers(book: Book, adapter: Adapter, directory: str | FilePath) -> None:
    """The file's layers are the model's, of the right sizes, and all that its config selects."""
    for name, (lam, gamma) in adapter.layers.items():
        if name not in book.layers:
            raise TargetError(
                f"{directory} adapts layer {name!r}, which this model does not have as a linear "
                f"layer; it has {nearest(name, list(book.layers))}"
            )
        _, n, smallest = used_box(book.layers[name].matrix, adapter.config.r)
        if lam.shape != (adapter.config.r, n) or gamma.shape != (n, smallest):
            raise TargetError(
                f"{directory}: layer {name!r} has lambda {lam.shape} and gamma {gamma.shape}; this "
                f"model's (in, out) = {book.layers[name].matrix} needs "
                f"{(adapter.config.r, n)} and {(n, smallest)}: it was trained on another model"
            )
    chosen = targets.select(
        adapter.config,
        list(book.layers),
        [m for m in book.modules if m not in book.layers],
        model_type=book.origin.model_type,
        output_embedding=book.origin.output_embedding,
    )
    if set(chosen) != set(adapter.layers):
        missing, extra = set(chosen) - set(adapter.layers), set(adapter.layers) - set(chosen)
        raise AdapterFileError(
            f"{directory}: target_modules={adapter.config.target_modules!r} and the tensors of the "
            f"file disagree; layers without tensors: {sorted(missing)}, tensors without a layer: "
            f"{sorted(extra)}"
        )


def _saved_leaves(
    book: Book, base: Mapping[Path, jax.Array], adapter: Adapter, directory: str | FilePath
) -> dict[Path, jax.Array]:
    known = {}
    for path in base:
        if path[-1] in names.TORCH_LEAF:
            known[names.torch_key(path)] = path
    saved = {}
    for key, value in adapter.saved.items():
        if ".original_module." in key:  # PEFT's copy of a frozen bias, which nothing uses
            continue
        name = key.replace(".base_layer.", ".")
        if name not in known:
            raise TargetError(
                f"{directory} carries {key!r}, which this model does not have; it has "
                f"{nearest(key, list(known))}"
            )
        path = known[name]
        layer = book.layers.get(names.dotted(path[:-1]))
        value = value.astype(np.float32)  # trained numbers are widened, never narrowed
        saved[path] = names.from_torch(value, path, layer, base[path])
    return saved
