"""The modules of a linen model, and which of their arrays may be kernels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.update import holds_sums
from randlora_jax.front_ends.linen.normed import normed_kernels
from randlora_jax.front_ends.linen.tracing import Axes, Trace, TracedModule
from randlora_jax.front_ends.nnx_types import DENSE
from randlora_jax.front_ends.params import owner_of
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.finding import FoundModule, StatedLayouts
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import absent_kernel
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.quantised import are_integers, kernel_at

Arrays = dict[Path, jax.Array]


def modules_of(
    collections: Mapping[str, Any],
    leaves: Mapping[Path, jax.Array],
    trace: Trace | None,
    stated: StatedLayouts,
) -> list[FoundModule]:
    """Every module with the params that it holds itself.

    Args:
      leaves: the params.
      trace: of a run of the model; where there is none, or it did not reach a module, a ``kernel``
        of two axes is taken for a Dense's, until the module is called.
    """
    owned: dict[Path, Arrays] = {}
    holders: dict[Path, TracedModule] = {}
    for path, array in leaves.items():
        traced = trace.holder_of(path) if trace else None
        if traced is None:
            owner = owner_of(collections["params"], path)
        else:
            owner, holders[owner] = traced
        owned.setdefault(owner, {})[path[len(owner) :]] = array
    normed = normed_kernels(collections)
    found = []
    for path, arrays in owned.items():
        why = {leaf: normed[(*path, *leaf)] for leaf in arrays if (*path, *leaf) in normed}
        for outer, reason in trace.normed.items() if trace else ():
            if path[: len(outer)] == outer:
                why = dict.fromkeys(arrays, reason)
        if (holder := holders.get(path)) is None:
            taken = taken_for(path, arrays, stated)
            why = _untold(arrays) | why
            found.append(FoundModule(path, arrays, type=taken, refusals=why))
            continue
        if holder.is_stated and holder.type:
            _refuse_absent_kernel(holder.kind, path, holder.type.leaf, arrays)
        known = holder.type and _as_held(holder.type, holder, arrays)
        inside = holder.within
        if path != inside:
            why = _unjoinable(arrays) | why
        found.append(
            FoundModule(path, arrays, holder.kind, known, holder.other, why, inside=inside)
        )
    return found


def _refuse_absent_kernel(kind: str, path: Path, leaf: str, arrays: Arrays) -> None:
    """Nothing, if a module has the kernel that a user's ``layer_types=`` says it has.

    Raises:
      ConfigError: it has not.
    """
    if leaf.partition("/")[0] not in {held[0] for held in arrays}:
        raise absent_kernel(kind, path, leaf, [slashed(held) for held in arrays])


def _untold(arrays: Arrays) -> dict[Path, str]:
    """Why the integers of a module that has not run take no adapter."""
    return {
        leaf: f"it holds {x.dtype} numbers, and only a run tells whether its module is one that is "
        "known to multiply by them: pass sample_inputs=(...), what the model is called with"
        for leaf, x in arrays.items()
        if not holds_sums(x.dtype) and not are_integers(leaf)
    }


def _unjoinable(arrays: Arrays) -> dict[Path, str]:
    """Why arrays of a part of an nnx module, which runs with W + delta, take no adapter."""
    return {
        leaf: f"it holds {x.dtype} numbers, which a float update cannot join, in a part of an nnx "
        "module inside a linen one, which runs with W + delta"
        for leaf, x in arrays.items()
        if not holds_sums(x.dtype)
    }


def taken_for(path: Path, arrays: Arrays, stated: StatedLayouts) -> LayerType | None:
    """What a module that has not run is taken for."""
    leaf = kernel_at(("kernel",), arrays)
    if leaf is None or arrays[leaf].ndim != 2:
        return None
    return None if stated.find(path) or stated.find((*path, *leaf)) else DENSE


def _as_held(known: LayerType, holder: TracedModule, arrays: Arrays) -> LayerType:
    """A type of layer with the axes along which its kernel is stacked in the model's params."""
    leaf = kernel_at(tuple(known.leaf.split("/")), arrays)
    sees: Axes | None = holder.axes.get(slashed(leaf)) if leaf else None
    if leaf is None or sees is None:
        return known
    if known.shape is not None:
        return _packed_as_held(known, sees, arrays[leaf].shape)
    if len(sees) != len(known.layout.axes):
        return known
    whole = ["s"] * arrays[leaf].ndim
    for axis, letter in zip(sees, known.layout.axes, strict=True):
        whole[axis] = letter
    return replace(known, layout=KernelLayout("".join(whole)))


def _packed_as_held(known: LayerType, sees: Axes, stored: tuple[int, ...]) -> LayerType:
    """A type of layer that packs its kernel, with the axes that come first and stack such arrays.

    Args:
      sees: those axes of the array of shape `stored` that a layer sees.

    Raises:
      ConfigError: other axes than the first stack them.
    """
    stacks = len(stored) - len(sees)
    if sees != tuple(range(stacks, len(stored))):
        raise ConfigError(
            f"layer_types: a packed kernel, an array of shape {stored}, is stacked by scans or "
            f"vmaps along others than its first axes (a layer sees the axes {sees}): stack it "
            "along axis 0"
        )
    assert known.shape is not None
    layout = KernelLayout("s" * stacks + known.layout.axes)
    return replace(known, layout=layout, shape=(*stored[:stacks], *known.shape))
