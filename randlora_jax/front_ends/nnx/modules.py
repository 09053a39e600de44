"""The modules of an nnx model, and which of their arrays may be kernels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from flax import nnx

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends.nnx.bridges import bridge_of
from randlora_jax.front_ends.nnx.held import constants_of, held_by, is_container, raw
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.variables import SharedBasis
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.finding import (
    FoundModule,
    StatedLayouts,
    multiplies_another,
)
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Path, dotted, slashed
from randlora_jax.models.quantised import are_integers, arrays_in, kernel_at

# What has kernels and is no linear layer.
_OTHER: Mapping[type, str] = {
    nnx.Embed: "an embedding",
    nnx.Conv: "a convolution",
    nnx.ConvTranspose: "a convolution",
    nnx.BatchNorm: "a norm",
    nnx.LayerNorm: "a norm",
    nnx.RMSNorm: "a norm",
    nnx.GroupNorm: "a norm",
    nnx.InstanceNorm: "a norm",
}

# What multiplies by another kernel than the one it stores.
_NORMED = (nnx.WeightNorm, nnx.SpectralNorm)

_NO_PARAMETERS = (nnx.RngState, nnx.BatchStat, nnx.Cache, nnx.Intermediate, SharedBasis)


def modules_of(
    walked: Sequence[tuple[Path, nnx.Module]], types: LayerTypes, stated: StatedLayouts
) -> list[FoundModule]:
    """Every module of a model with the parameters that it holds itself.

    Without layers that are adapted in another wrapped model, which is a part of this one.

    Args:
      walked: the modules, by their paths.
      stated: layouts that the user states.
    """
    theirs = {path for path, module in walked if isinstance(module, RandLoraLayer)}
    held = {
        path: dict(_arrays_of(module))
        for path, module in walked
        if not _is_held(path, module) and not any(path[:i] in theirs for i in range(len(path)))
    }
    owners: dict[_Owner, list[Path]] = {}
    for path, mine in held.items():
        for leaf, (_, owner) in mine.items():
            owners.setdefault(owner, []).append((*path, *leaf))
    normed = {path: module for path, module in walked if isinstance(module, _NORMED)}
    found = []
    for path, module in walked:
        if path not in held:
            continue
        if bridge := bridge_of(module):
            found += bridge.modules(path, module, stated)
            continue
        arrays = {leaf: array for leaf, (array, _) in held[path].items()}
        known = types.find(module)
        if known and not known.shape and not stated.find(path):
            known = _as_held(path, known, module, arrays)
        found.append(
            FoundModule(
                path,
                arrays,
                type(module).__name__,
                known,
                next((what for kind, what in _OTHER.items() if isinstance(module, kind)), None),
                _refusals(path, held[path], owners, normed),
                constants=dict(constants_of(module)),
            )
        )
    return found


def _as_held(
    path: Path, known: LayerType, module: nnx.Module, arrays: Mapping[Path, Any]
) -> LayerType:
    """A type of layer with the axes along which ``nnx.vmap`` stacked this one's kernel.

    Raises:
      ConfigError: its extents do not tell.
    """
    leaf, axes = kernel_at((known.leaf,), arrays), known.layout.axes
    array = arrays[leaf] if leaf else None
    extents = _extents(module)
    if array is None or extents is None or array.ndim <= len(axes):
        return known
    everywhere = range(array.ndim)
    fitting = [
        stack
        for stack in combinations(everywhere, array.ndim - len(axes))
        if [array.shape[i] for i in everywhere if i not in stack] == extents
    ]
    if not fitting or fitting[0] == tuple(range(len(fitting[0]))):
        return known  # the first axes, as is usual
    if len(fitting) > 1:
        raise ConfigError(
            f"layer {dotted(path)!r}: its kernel {array.shape} stacks several of {tuple(extents)}, "
            f"and which axis stacks them cannot be told: state it, views={{{slashed(path)!r}: ...}}"
        )
    letters = iter(axes)
    return replace(
        known,
        layout=KernelLayout("".join("s" if i in fitting[0] else next(letters) for i in everywhere)),
    )


def _extents(module: nnx.Module) -> list[int] | None:
    """Of the kernel of one layer, as flax's types tell it."""
    if isinstance(module, nnx.LinearGeneral):
        sizes = *module.batch_axis.values(), *module.in_features, *module.out_features
        return list(sizes)
    if isinstance(module, nnx.Linear):
        return [module.in_features, module.out_features]
    return list(module.kernel_shape) if isinstance(module, nnx.Einsum) else None


def _is_held(path: Path, module: nnx.Module) -> bool:
    """Whether what a module holds is not its own: a container's, or adapters' of another model."""
    return bool(path) and (is_container(module) or isinstance(module, RandLoraLayer))


# What changes with an array wherever it is held: the ``id`` of that, and the array's path in it.
_Owner = tuple[int, Path]


def _arrays_of(module: nnx.Module) -> Iterator[tuple[Path, tuple[Any, _Owner]]]:
    """The arrays of the parameters that a module holds itself, and what each shares."""
    for leaf, held in held_by(module):
        if isinstance(held, _NO_PARAMETERS):
            continue
        for path, array in arrays_in(raw(held)).items():
            owner = (id(array), ()) if isinstance(array, nnx.Variable) else (id(held), path)
            yield (*leaf, *path), (raw(array), owner)


def _refusals(
    path: Path,
    arrays: Mapping[Path, tuple[Any, _Owner]],
    owners: Mapping[_Owner, list[Path]],
    normed: Mapping[Path, nnx.Module],
) -> dict[Path, str]:
    """Why arrays of the module at `path` can take no adapter."""
    for outer, module in normed.items():
        if path[: len(outer)] == outer and path != outer:
            what = f"{type(module).__name__} {dotted(outer)!r}"
            return dict.fromkeys(arrays, multiplies_another(what))
    found = {}
    for leaf, (_, owner) in arrays.items():
        inside = owner[1]  # of what its Variable holds
        if inside and not are_integers(inside):
            found[leaf] = "it is a part of what one Variable holds: hold it in an nnx.Param itself"
        others = [dotted(where) for where in owners[owner] if where != (*path, *leaf)]
        if others:
            found[leaf] = f"its array is {', '.join(others)}, too: what changes one changes all"
    return found
