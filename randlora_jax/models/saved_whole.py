"""What adapters train whole, to and from PEFT's files."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.update import at_least_float32
from randlora_jax.interop import targets
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import TargetError, listed, shown, warn
from randlora_jax.interop.keys import biases_by_one_name, file_key, trained_tensors
from randlora_jax.interop.written_modules import taken, written_modules
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import EMBEDDINGS, Path, dotted, slashed
from randlora_jax.models.peft_layout import (
    from_peft_layout,
    refuse_unwritable,
    to_peft_layout,
    torch_keys,
)
from randlora_jax.models.registry import AdapterRegistry, AdapterState


def modules_of(
    registry: AdapterRegistry, config: RandLoraConfig, saved: Collection[str]
) -> list[str]:
    """What ``modules_to_save`` is in the file: `config` has the names that were wrapped with.

    Args:
      saved: keys of what was trained whole.

    Raises:
      TargetError: PEFT would train more than was trained here.
    """
    others = {*registry.modules, *registry.owners()} - {key.rpartition(".")[0] for key in saved}
    names = written_modules(config, saved, others)
    if more := taken(names, others):
        raise TargetError(
            f"modules_to_save={shown(names)}, as names= has them, would train {listed(more)} "
            "besides in PEFT, which takes every module whose path ends so: give names= when "
            "wrapping, and modules_to_save in those names"
        )
    return names


def tensors_of(registry: AdapterRegistry, state: AdapterState) -> dict[str, np.ndarray]:
    """What is trained whole or carried, by the file's key."""
    saved: dict[str, np.ndarray] = {}
    owners: dict[str, Path] = {}
    adapted = {name for layer in state.layers for name in registry.layers[layer].names}
    for path, value in state.saved.items():
        layer = registry.layer_of(path)
        _refuse_stacked(registry, path, layer, value)
        for key, tensor in to_peft_layout(value, path, layer, registry.names).items():
            _refuse_another(owners, key, path)
            saved[file_key(key, adapted)] = tensor
    return saved


def keys_of(registry: AdapterRegistry, state: AdapterState) -> set[str]:
    """The keys that `tensors_of` gives."""
    adapted = {name for layer in state.layers for name in registry.layers[layer].names}
    keys = (torch_keys(path, registry.layer_of(path), registry.names) for path in state.saved)
    return {file_key(key, adapted) for key in chain.from_iterable(keys)}


def warn_of_unwritable(registry: AdapterRegistry, name: str, state: AdapterState) -> None:
    """Warn before an adapter is trained if what it trains whole cannot be written for PEFT."""
    owners: dict[str, Path] = {}
    try:
        for path, leaf in state.saved.items():
            layer = registry.layer_of(path)
            refuse_unwritable(path, layer, registry.names, leaf)
            _refuse_stacked(registry, path, layer, leaf)
            for key in torch_keys(path, layer, registry.names):
                _refuse_another(owners, key, path)
    except TargetError as error:
        warn(
            f"adapter {name!r} can be trained, and kept by orbax, but save_pretrained will refuse "
            f"it: {error}"
        )


def _refuse_another(owners: dict[str, Path], key: str, path: Path) -> None:
    """Takes down in `owners` that the leaf at `path` is what PyTorch calls `key`.

    Raises:
      TargetError: another one is, too, and a file has room for one.
    """
    other = owners.setdefault(key, path)
    if other != path:
        raise TargetError(
            f"{dotted(other)!r} and {dotted(path)!r} both are {key!r} in PyTorch, which is one "
            "tensor: correct the names rules where these gave two modules one name; else leave "
            "them out of modules_to_save and bias"
        )


def warn_of_no_bias(
    registry: AdapterRegistry, config: RandLoraConfig, paths: Iterable[Path], state: AdapterState
) -> None:
    """Warn before an adapter is trained if its ``bias`` finds nothing to train.

    Args:
      paths: of the base model's leaves.
    """
    whole = targets.saved_modules(config)
    if config.bias == "none" or not all(registry.is_whole(path, whole) for path in state.saved):
        return
    others = [slashed(path) for path in paths if str(path[-1]).endswith("_bias")]
    besides = f" Names in PyTorch are unknown of {listed(others)}." if others else ""
    warn(
        f"bias={config.bias!r} finds nothing to train: "
        f"{'no adapted layer' if config.bias == 'randlora_only' else 'no module'} has an array "
        f"called 'bias' or 'b'.{besides} PEFT trains every bias that the model has in PyTorch: if "
        "it has some, expect another result; if not, bias='none' says so"
    )


def warn_of_no_parameter(
    registry: AdapterRegistry, config: RandLoraConfig, state: AdapterState
) -> None:
    """Warn before an adapter is trained of ``modules_to_save`` that find nothing to train."""
    modules = {*registry.modules, *registry.owners()}
    trained = set[str]()
    for path in state.saved:
        layer = registry.layer_of(path)
        trained |= set(layer.names) if layer else {registry.names.first(path[:-1])}

    def finds(pattern: str, names: set[str]) -> bool:
        return any(targets.inside_saved(name, [pattern]) for name in names)

    wanted = config.modules_to_save or ()
    if idle := [x for x in wanted if finds(x, modules) and not finds(x, trained)]:
        warn(
            f"modules_to_save: there is nothing to train in {listed(idle)}: no array there is a "
            "parameter. In nnx, hold what is to be trained in an nnx.Param"
        )


def _refuse_stacked(
    registry: AdapterRegistry, path: Path, layer: Layer | None, leaf: jax.Array
) -> None:
    """Nothing, if a leaf that is trained whole is no stack without a kernel that tells its names.

    Raises:
      TargetError: a scan stacks it, and it is no linear layer's.
    """
    if layer or leaf.ndim < 2 or path[-1] in EMBEDDINGS:
        return
    around = [other for other in registry.layers.values() if other.path[:1] == path[:1]]
    if any(set(other.stack) & set(leaf.shape) for other in around):
        raise TargetError(
            f"{dotted(path)!r} has shape {leaf.shape}: a scan stacks it, as the layers beside it, "
            "and PyTorch has it in parts, which no kernel names: leave it out of modules_to_save"
        )


def leaves_of(
    registry: AdapterRegistry,
    base: Mapping[Path, jax.Array],
    adapter: Adapter,
    directory: str | FilePath,
) -> dict[Path, jax.Array]:
    """What the file holds of modules trained whole, and carries, by path."""
    tensors = trained_tensors(adapter.saved)
    saved: dict[Path, jax.Array] = {}
    owners: dict[str, Path] = {}
    known = _known_keys(registry, base) if tensors else {}
    tensors = biases_by_one_name(tensors, set(chain(*known.values())).__contains__)
    for path, keys in known.items():
        present = [key for key in keys if key in tensors]
        if present and len(present) < len(keys):
            raise TargetError(
                f"{directory} carries {present}, a part of {dotted(path)!r}, which is one "
                f"array here: {sorted(set(keys) - set(present))} are missing"
            )
        if present:
            for key in keys:
                _refuse_another(owners, key, path)
            leaf = base[path]
            held = [_held(key, tensors[key], leaf, directory) for key in keys]
            saved[path] = from_peft_layout(held, path, registry.layer_of(path), leaf)
    for key in tensors:
        if key not in owners and not _is_repeated(key, tensors, registry.info.tied):
            raise TargetError(
                f"{directory} carries {shown(key)}, which this model does not have; its parameters "
                f"of modules_to_save={shown(adapter.config.modules_to_save)} and bias="
                f"{adapter.config.bias!r} have other names"
            )
    return saved


def less_the_bases(
    saved: Mapping[Path, jax.Array], base: Mapping[Path, jax.Array], carried: Collection[Path]
) -> dict[Path, jax.Array]:
    """`saved` less what the base model has: such is not held twice, and hinders no other adapter.

    Args:
      carried: what may be left out, as `AdapterRegistry.carried`.
    """
    return {
        path: leaf
        for path, leaf in saved.items()
        if path not in carried or not _is_held(base[path], leaf)
    }


def _is_held(leaf: jax.Array, carried: jax.Array) -> bool:
    """Whether the base model holds these numbers, as far as its dtype does."""
    return not is_abstract(leaf) and bool(jnp.array_equal(leaf, carried.astype(leaf.dtype)))


def _is_repeated(
    key: str, tensors: Mapping[str, np.ndarray], tied: Iterable[Sequence[str]]
) -> bool:
    """Whether the file has a tensor again under the name that the model has it by.

    PEFT writes the input and the output embedding where the vocabulary was resized, tied or not.

    Args:
      tied: as `BaseModelInfo.tied`.
    """
    module, _, leaf = key.rpartition(".")
    held = [f"{group[0]}.{leaf}" for group in tied if module in group[1:]]
    return any(name in tensors and np.array_equal(tensors[name], tensors[key]) for name in held)


def _known_keys(registry: AdapterRegistry, paths: Iterable[Path]) -> dict[Path, tuple[str, ...]]:
    """The state-dict keys of leaves; without those that have no name in PyTorch, and so no file."""
    known = {}
    for path in paths:
        with suppress(TargetError):
            known[path] = torch_keys(path, registry.layer_of(path), registry.names)
    return known


def _held(key: str, tensor: np.ndarray, leaf: jax.Array, directory: str | FilePath) -> np.ndarray:
    """A tensor trained whole, as wide as a model trains `leaf`; what does not fit is said."""
    held = tensor.astype(at_least_float32(leaf.dtype))
    if not np.array_equal(held, tensor):
        warn(
            f"{directory}: {shown(key)} holds {tensor.dtype} numbers, which this model's "
            f"{leaf.dtype} array trains in {held.dtype}: they are rounded. To keep them, wrap a "
            "model that holds this array in float64 (jax_enable_x64)"
        )
    return held
