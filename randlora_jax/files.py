"""Between a model's adapter and its PEFT directory: names, layouts, whose the bases are."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import names, origins, targets
from randlora_jax.bases import draw, peft_box, used_box
from randlora_jax.book import AdapterState, Book
from randlora_jax.config import RandLoraConfig
from randlora_jax.errors import AdapterFileError, TargetError, nearest
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.peft_dir import read_adapter
from randlora_jax.layers import AdapterSpec
from randlora_jax.names import Path
from randlora_jax.origins import Pair, Stored


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
    book: Book,
    base: Mapping[Path, jax.Array],
    directory: str | FilePath,
    adapter_name: str,
    torch_generation: str | None,
) -> tuple[AdapterSpec, RandLoraConfig, AdapterState, Stored]:
    """Reads an adapter directory and fits it to a model; changes nothing.

    Returns:
      the adapter's spec, config and state, and of its bases what cannot be drawn again.

    Raises:
      AdapterFileError: the files are damaged, or hold other tensors than their config asks for.
      TargetError: the adapter's layers and the model's do not fit together.
    """
    adapter = read_adapter(directory)
    _check_layers(book, adapter, directory)
    box = peft_box([book.layers[name].matrix for name in adapter.layers], adapter.config.r)
    if adapter.bases is not None:
        a, b = adapter.bases
        if (b.shape[0], a.shape[2]) != (box.max, box.min):
            raise TargetError(
                f"{directory} has bases for extents {(b.shape[0], a.shape[2])}; its layers need "
                f"{(box.max, box.min)} in this model, and PEFT would refuse anything else: it was "
                "trained on another model"
            )
    dtype = base_dtype(book, base, adapter.layers)
    identity, stored, config = origins.of_adapter(adapter, box, dtype, torch_generation, directory)
    spec = AdapterSpec(adapter_name, config.scaling, config.randlora_dropout, identity, box)
    saved = _saved_leaves(book, base, adapter, directory)
    layers = {
        k: (jnp.asarray(lam), jnp.asarray(gamma)) for k, (lam, gamma) in adapter.layers.items()
    }
    return spec, config, AdapterState(layers, saved), stored


def base_dtype(book: Book, base: Mapping[Path, jax.Array], layers: Iterable[str]) -> np.dtype:
    """The dtype of the kernels of `layers`, to which PEFT casts PyTorch's bases.

    PEFT moves one shared pair along layer by layer, so the last layer decides; here they agree.
    """
    dtypes = {base[(*book.layers[name].path, "kernel")].dtype for name in layers}
    return np.dtype(dtypes.pop()) if len(dtypes) == 1 else np.dtype(np.float32)


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
