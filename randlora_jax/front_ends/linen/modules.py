"""The modules of a linen model, and which of their arrays may be kernels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends.linen.normed import normed_kernels
from randlora_jax.front_ends.linen.tracing import Axes, Trace, TracedModule
from randlora_jax.front_ends.linen.types import DENSE
from randlora_jax.models.finding import FoundModule, StatedLayouts
from randlora_jax.models.layer import LayerType
from randlora_jax.models.names import Path

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
    for leaf, array in leaves.items():
        owned.setdefault(leaf[:-1], {})[leaf[-1:]] = array
    normed = normed_kernels(collections)
    found = []
    for path, arrays in owned.items():
        holder = trace.holder_of(path) if trace else None
        why = {leaf: normed[(*path, *leaf)] for leaf in arrays if (*path, *leaf) in normed}
        for outer, reason in trace.normed.items() if trace else ():
            if path[: len(outer)] == outer:
                why = dict.fromkeys(arrays, reason)
        if holder is None:
            taken = _taken(path, arrays, stated)
            found.append(FoundModule(path, arrays, type=taken, refusals=why))
            continue
        known = holder.type and _as_held(holder.type, holder, arrays)
        found.append(
            FoundModule(path, arrays, holder.kind, known, holder.other, why, inside=holder.path)
        )
    return found


def _taken(path: Path, arrays: Arrays, stated: StatedLayouts) -> LayerType | None:
    """What a module that has not run is taken for."""
    leaf = ("kernel",)
    if leaf not in arrays or arrays[leaf].ndim != 2:
        return None
    return None if stated.find(path) or stated.find((*path, *leaf)) else DENSE


def _as_held(known: LayerType, holder: TracedModule, arrays: Arrays) -> LayerType:
    """A type of layer with the axes along which its kernel is stacked in the model's params."""
    sees: Axes | None = holder.axes.get(known.leaf)
    array = arrays.get(tuple(known.leaf.split("/")))
    if sees is None or array is None or len(sees) != len(known.layout.axes):
        return known
    whole = ["s"] * array.ndim
    for axis, letter in zip(sees, known.layout.axes, strict=True):
        whole[axis] = letter
    return replace(known, layout=KernelLayout("".join(whole)))
