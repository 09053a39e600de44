"""Between a model's adapter and its PEFT directory: names, layouts, whose the bases are."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.bases import draw, in_full, used_box
from randlora_jax.core.layers import AdapterSpec, Layer
from randlora_jax.interop import targets
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, RandLoraError, TargetError, nearest, shown
from randlora_jax.interop.peft_dir import read_adapter
from randlora_jax.models import names, origins
from randlora_jax.models.names import Path
from randlora_jax.models.origins import Pair, Stored
from randlora_jax.models.registry import AdapterState, Book


def export(book: Book, adapter_name: str, state: AdapterState) -> Adapter:
    """An adapter in PEFT's names and layouts, in host memory.

    Raises:
      TargetError: a leaf has no PyTorch name.
    """
    spec, config = book.specs[adapter_name], book.configs[adapter_name]
    layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    owners: dict[str, Layer] = {}
    for name, (lam, gamma) in state.layers.items():
        layer = book.layers[name]
        if len(layer.names) != math.prod(layer.stack):
            raise TargetError(
                f"{name!r} holds {layer.stack} PyTorch layers in one array, and no rule says how "
                f"they are named: pass names={{{name.replace('.', '/')!r}: 'model.layers.{{}}...'}}"
            )
        gammas = layer.split(np.asarray(gamma))
        layers |= {k: (lam, gammas[k]) for k, lam in layer.split(np.asarray(lam)).items()}
        owners |= dict.fromkeys(layer.names, layer)
    bases = peft_pair(book, spec)
    if book.origin.model_type and not (config.base_model_name_or_path or book.origin.name_or_path):
        warnings.warn(
            "base_model_name_or_path is unknown, so PEFT's Auto classes will not find the base "
            "model of this adapter; give it in RandLoraConfig",
            stacklevel=4,
        )
    written = dataclasses.replace(
        config,
        target_modules=targets.write_targets(layers, [*book.modules, *book.owners()]),
        layers_to_transform=None,  # target_modules says all
        layers_pattern=None,
        modules_to_save=targets.saved_modules(config) or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in owners.values()),
        base_model_name_or_path=config.base_model_name_or_path or book.origin.name_or_path,
        auto_mapping=config.auto_mapping
        or (None if config.task_type else book.origin.auto_mapping),
        inference_mode=True,
    )
    return Adapter(
        config=written,
        layers=layers,
        saved=_saved_tensors(book, state),
        bases=bases,
        provenance=Provenance(
            source=spec.identity.source,
            projection_prng_key=spec.identity.key,
            kind=spec.identity.kind,
            digest=bases_digest(*bases),
            shapes={
                name: (out, in_) for name, layer in owners.items() for in_, out in [layer.matrix]
            },
        ),
    )


def warn_if_apart(adapters: Mapping[str, Adapter]) -> None:
    """Warn where PEFT refuses to open these adapters in one model, or would mix them up."""
    first, *others = adapters
    bases = {name: a.provenance.digest for name, a in adapters.items() if a.provenance}
    other = [name for name in others if bases[name] != bases[first]]
    biased = [name for name, adapter in adapters.items() if adapter.config.bias != "none"]
    reason = ""
    if other:
        reason = f"{other} have other bases than {first!r}: other targets, rank or kind"
    elif len(biased) > 1:
        reason = f"{biased} all train biases"
    if reason:
        warnings.warn(
            f"PEFT cannot open these adapters in one PyTorch model, only one at a time: {reason}",
            stacklevel=4,
        )


def _saved_tensors(book: Book, state: AdapterState) -> dict[str, np.ndarray]:
    """What is trained whole, by PyTorch key."""
    saved: dict[str, np.ndarray] = {}
    for path, value in state.saved.items():
        module = names.dotted(path[:-1])
        tensors = names.to_torch(value, path, book.layers.get(module), book.names)
        if module in state.layers:  # PEFT's wrapper holds an adapted layer one level down
            tensors = {_below(key): tensor for key, tensor in tensors.items()}
        saved |= tensors
    return saved


def _below(key: str) -> str:
    module, leaf = key.rsplit(".", 1)
    return f"{module}.base_layer.{leaf}"


def peft_pair(book: Book, spec: AdapterSpec) -> Pair:
    """The adapter's pair with exactly the extents PEFT expects in a file."""
    if spec.identity in book.stored:
        return book.stored[spec.identity]
    return in_full(spec.identity, draw(spec.identity, spec.box))


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
    with _about(directory):
        adapter = read_adapter(directory)
        owners = book.owners()
        _check_layers(book, owners, adapter, directory)
        chosen = {name: owners[name] for name in adapter.layers}
        box = book.box(chosen, adapter.config.r)
        if adapter.bases is not None:
            a, b = adapter.bases
            if (b.shape[0], a.shape[2]) != (box.max, box.min):
                raise TargetError(
                    f"{directory} has bases for extents {(b.shape[0], a.shape[2])}; its layers "
                    f"need {(box.max, box.min)} in this model, and PEFT would refuse anything "
                    "else: it was trained on another model"
                )
        dtype = base_dtype(base, chosen.values())
        identity, stored, config = origins.of_adapter(
            adapter, box, dtype, torch_generation, directory
        )
        scaling = config.scaling * origins.unit(identity, stored)
        spec = AdapterSpec(adapter_name, scaling, config.randlora_dropout, identity, box)
        saved = _saved_leaves(book, base, adapter, directory)
        lams = {name: lam for name, (lam, _) in adapter.layers.items()}
        gammas = {name: gamma for name, (_, gamma) in adapter.layers.items()}
        layers = {
            layer.name: (jnp.asarray(layer.join(lams)), jnp.asarray(layer.join(gammas)))
            for layer in chosen.values()
        }
        return spec, config, AdapterState(layers, saved), stored


@contextmanager
def _about(directory: str | FilePath) -> Iterator[None]:
    """Errors within say which directory they are about."""
    try:
        yield
    except RandLoraError as error:
        if str(directory) in str(error):
            raise
        raise type(error)(f"{directory}: {error}") from error


def base_dtype(base: Mapping[Path, jax.Array], layers: Iterable[Layer]) -> np.dtype:
    """The dtype of the kernels of `layers`, to which PEFT casts PyTorch's bases.

    PEFT moves one shared pair along layer by layer, so the last layer decides; here they agree.
    """
    dtypes = {base[layer.kernel_path].dtype for layer in layers}
    return np.dtype(dtypes.pop()) if len(dtypes) == 1 else np.dtype(np.float32)


def _check_layers(
    book: Book, owners: Mapping[str, Layer], adapter: Adapter, directory: str | FilePath
) -> None:
    """The file's layers are the model's, of the right sizes, and all that its config selects."""
    for name, (lam, gamma) in adapter.layers.items():
        if name not in owners:
            raise TargetError(
                f"{directory} adapts layer {shown(name)}, which this model does not have as a "
                f"linear layer; it has {nearest(name, list(owners))}"
            )
        matrix = owners[name].matrix
        _, n, smallest = used_box(matrix, adapter.config.r)
        if lam.shape != (adapter.config.r, n) or gamma.shape != (n, smallest):
            raise TargetError(
                f"{directory}: layer {shown(name)} has lambda {lam.shape} and gamma {gamma.shape}; "
                f"this model's (in, out) = {matrix} needs {(adapter.config.r, n)} and "
                f"{(n, smallest)}: it was trained on another model"
            )
    chosen = book.select(adapter.config)
    if set(chosen) != set(adapter.layers):
        missing, extra = set(chosen) - set(adapter.layers), set(adapter.layers) - set(chosen)
        raise AdapterFileError(
            f"{directory}: target_modules={shown(adapter.config.target_modules)} and the tensors "
            f"of the file disagree; layers without tensors: {shown(sorted(missing))}, tensors "
            f"without a layer: {shown(sorted(extra))}"
        )


def _saved_leaves(
    book: Book, base: Mapping[Path, jax.Array], adapter: Adapter, directory: str | FilePath
) -> dict[Path, jax.Array]:
    # PEFT's copy of a frozen bias is the base model's own; no output depends on it
    tensors = {k: v for k, v in adapter.saved.items() if ".original_module." not in k}
    tensors = {k.replace(".base_layer.", "."): v for k, v in tensors.items()}
    saved, used = {}, set()
    for path, leaf in base.items():
        layer = book.layers.get(names.dotted(path[:-1]))
        if path[-1] not in names.TORCH_LEAF and not (layer and path == layer.kernel_path):
            continue
        keys = names.torch_keys(path, layer, book.names)
        present = [key for key in keys if key in tensors]
        if present and len(present) < len(keys):
            raise TargetError(
                f"{directory} carries {present}, a part of {names.dotted(path)!r}, which is one "
                f"array here: {sorted(set(keys) - set(present))} are missing"
            )
        if present:
            # trained numbers are widened, never narrowed
            wide = [tensors[key].astype(np.float32) for key in keys]
            saved[path] = names.from_torch(wide, path, layer, leaf)
            used |= set(keys)
    for key in tensors:
        if key not in used:
            raise TargetError(
                f"{directory} carries {shown(key)}, which this model does not have; its parameters "
                f"of modules_to_save={shown(adapter.config.modules_to_save)} and bias="
                f"{adapter.config.bias!r} have other names"
            )
    return saved
