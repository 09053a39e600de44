"""The modules of an nnx model, and which of their arrays may be kernels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from flax import nnx

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends.nnx.bridges import bridge_of
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
from randlora_jax.models.quantised import INTEGERS, SCALE, is_quantised

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

_CONTAINERS = (nnx.List, nnx.Dict)
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
        path: dict(_variables_of(module))
        for path, module in walked
        if not _is_held(path, module) and not any(path[:i] in theirs for i in range(len(path)))
    }
    owners: dict[int, list[Path]] = {}
    for path, variables in held.items():
        for leaf, variable in variables.items():
            owners.setdefault(id(variable), []).append((*path, *leaf))
    normed = {path: module for path, module in walked if isinstance(module, _NORMED)}
    found = []
    for path, module in walked:
        if path not in held:
            continue
        if bridge := bridge_of(module):
            found += bridge.modules(path, module, stated)
            continue
        arrays = {leaf: variable.get_raw_value() for leaf, variable in held[path].items()}
        known = types.find(module)
        if known and not stated.find(path):
            known = _as_held(path, known, module, arrays)
        found.append(
            FoundModule(
                path,
                arrays,
                type(module).__name__,
                known,
                next((what for kind, what in _OTHER.items() if isinstance(module, kind)), None),
                _refusals(path, held[path], owners, normed),
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
    array, axes = arrays.get((known.leaf,)), known.layout.axes
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
    return bool(path) and isinstance(module, (*_CONTAINERS, RandLoraLayer))


def _variables_of(holder: Any) -> Iterator[tuple[Path, nnx.Variable[Any]]]:
    """The parameters that a module, or a container in it, holds itself."""
    if isinstance(holder, nnx.List | list | tuple):
        items: Any = enumerate(holder)
    elif isinstance(holder, dict):
        items = holder.items()
    else:
        items = vars(holder).items()
    for name, value in items:
        if isinstance(value, nnx.Variable):
            if not isinstance(value, _NO_PARAMETERS):
                yield (name,), value
        elif is_quantised(value):
            for outer, inner in (INTEGERS, SCALE):
                yield (name, outer, inner), getattr(getattr(value, outer), inner)
        elif isinstance(value, (*_CONTAINERS, list, tuple, dict)) and name != "_pytree__nodes":
            for leaf, variable in _variables_of(value):
                yield (name, *leaf), variable


def _refusals(
    path: Path,
    variables: Mapping[Path, nnx.Variable[Any]],
    owners: Mapping[int, list[Path]],
    normed: Mapping[Path, nnx.Module],
) -> dict[Path, str]:
    """Why arrays of the module at `path` can take no adapter."""
    for outer, module in normed.items():
        if path[: len(outer)] == outer and path != outer:
            what = f"{type(module).__name__} {dotted(outer)!r}"
            return dict.fromkeys(variables, multiplies_another(what))
    found = {}
    for leaf, variable in variables.items():
        others = [dotted(where) for where in owners[id(variable)] if where != (*path, *leaf)]
        if others:
            found[leaf] = f"its array is {', '.join(others)}, too: what changes one changes all"
    return found
