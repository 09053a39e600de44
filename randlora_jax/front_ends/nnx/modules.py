"""The modules of an nnx model, and which of their arrays may be kernels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from randlora_jax.front_ends.nnx.bridges import bridge_of
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.variables import SharedBasis
from randlora_jax.models.finding import QUANTISED, FoundModule, StatedLayouts
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Path, dotted

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

    Args:
      walked: the modules, by their paths.
      stated: layouts that the user states.
    """
    held = {path: dict(_variables_of(m)) for path, m in walked if not _is_held(path, m)}
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
        found.append(
            FoundModule(
                path,
                arrays,
                type(module).__name__,
                types.find(module),
                next((what for kind, what in _OTHER.items() if isinstance(module, kind)), None),
                _refusals(path, held[path], owners, normed),
            )
        )
    return found


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
        elif all(hasattr(getattr(value, QUANTISED[0], None), n) for n in (QUANTISED[1], "scale")):
            for part in (QUANTISED[1], "scale"):
                yield (name, QUANTISED[0], part), getattr(value.array, part)
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
            reason = (
                f"{type(module).__name__} {dotted(outer)!r} multiplies by another kernel than the "
                "one that is stored"
            )
            return dict.fromkeys(variables, reason)
    found = {}
    for leaf, variable in variables.items():
        others = [dotted(where) for where in owners[id(variable)] if where != (*path, *leaf)]
        if others:
            found[leaf] = f"its array is {', '.join(others)}, too: what changes one changes all"
    return found
