"""What of a model's kernels the adapters take, train whole or leave out, and why."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from randlora_jax.interop.errors import listed
from randlora_jax.models.finding import LeftArray
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.registry import AdapterRegistry, AdapterState

Taken = Literal["adapted", "trained whole", "left out"]


class CoveredArray(NamedTuple):
    """One array of the base model.

    Args:
      path: where it lies, with ``/`` between the parts.
      shape: of the array.
      taken: what adapters do with it.
      why: by which adapters; or the reason why none does.
    """

    path: str
    shape: tuple[int, ...]
    taken: Taken
    why: str


class Coverage(tuple[CoveredArray, ...]):
    """Every array that may be a kernel, and every one that is trained whole.

    Prints as a table; `numbers` counts.
    """

    def numbers(self) -> dict[Taken, int]:
        """How many numbers of the base model are adapted, trained whole and left out."""
        kinds: tuple[Taken, ...] = ("adapted", "trained whole", "left out")
        return {kind: sum(math.prod(a.shape) for a in self if a.taken == kind) for kind in kinds}

    def __str__(self) -> str:
        """One line for arrays that are alike but for indices in their paths."""
        alike: dict[tuple[str, ...], list[CoveredArray]] = {}
        for array in self:
            path = re.sub(r"(?<![^/])\d+(?![^/])", "*", array.path)
            alike.setdefault((array.taken, path, str(array.shape), array.why), []).append(array)
        rows = [
            (taken, path + (f" ({len(arrays)})" if len(arrays) > 1 else ""), shape, why)
            for (taken, path, shape, why), arrays in alike.items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else [0, 0, 0]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        counts = ", ".join(f"{n:,} numbers {kind}" for kind, n in self.numbers().items())
        return "\n".join([*(line.rstrip() for line in lines), counts])


def coverage(registry: AdapterRegistry, states: Mapping[str, AdapterState]) -> Coverage:
    """Of a wrapped model, in the order in which its layers were found."""
    found = []
    whole: dict[Path, tuple[list[str], tuple[int, ...]]] = {}
    for name, state in states.items():
        for path, leaf in registry.trained_part(name, state).saved.items():
            whole.setdefault(path, ([], leaf.shape))[0].append(repr(name))
    for path, (names, shape) in whole.items():
        found.append(CoveredArray(slashed(path), shape, "trained whole", f"by {', '.join(names)}"))
    for layer in registry.layers.values():
        if layer.kernel_path in whole:
            continue
        takers = [repr(name) for name, state in states.items() if layer.name in state.layers]
        taken: Taken = "adapted" if takers else "left out"
        why = f"by {', '.join(takers)}" if takers else layer.refusal or "no adapter targets it"
        found.append(CoveredArray(slashed(layer.kernel_path), layer.shape, taken, why))
    for array in registry.left:
        if array.path not in whole:
            found.append(CoveredArray(slashed(array.path), array.shape, "left out", _why(array)))
    return Coverage(found)


def _why(array: LeftArray) -> str:
    if array.other:
        return f"it is {array.other}"
    if array.kind:
        return f"what a {array.kind} computes with it is unknown"
    return "what is computed with it is unknown"


def left_out(registry: AdapterRegistry, hint: str = "") -> str:
    """A sentence on arrays that look like kernels and that no adapter can have; "" of none.

    Args:
      hint: a sentence on another way to have them, which the front end knows.
    """
    left = [array for array in registry.left if not array.other]
    if not left:
        return ""
    alike: dict[tuple[str, str, int], list[LeftArray]] = {}
    for array in left:
        owner = re.sub(r"(?<![^/])\d+(?![^/])", r"\\d+", re.escape(slashed(array.owner)))
        alike.setdefault((owner, array.kind, len(array.shape)), []).append(array)
    views = {_rule(owner, arrays): _guess(arrays[0]) for (owner, _, _), arrays in alike.items()}
    kinds = sorted({kind for _, kind, _ in alike if kind})
    ways = ["views={" + ", ".join(f"r'{rule}': {axes!r}" for rule, axes in views.items()) + "}"]
    if kinds:
        ways.append("layer_types={" + ", ".join(f"{kind}: LayerType(...)" for kind in kinds) + "}")
    shown = [f"{slashed(array.path)} {array.shape}" for array in left]
    what, them = f"{len(left)} arrays that look like kernels", "them"
    if len(left) == 1:
        what, them = "1 array that looks like a kernel", "it"
    return (
        f"the adapter leaves out {what}: {listed(shown)}. "
        f"{hint}To have {them}, state how the axes form matrices (i in, o out, s stack; check each "
        f"letter, and put one for each ?): {', or '.join(ways)}"
    )


def _rule(owner: str, arrays: Iterable[LeftArray]) -> str:
    """An expression that matches the paths of `arrays`, whose owners are alike."""
    leaves = sorted({re.escape(slashed(a.path[len(a.owner) :])) for a in arrays})
    last = leaves[0] if len(leaves) == 1 else f"({'|'.join(leaves)})"
    return f"{owner}/{last}" if owner else last


def _guess(array: LeftArray) -> str:
    """How the axes of an array may be meant; open where that may be a stack or a fused side."""
    return "i o" if len(array.shape) == 2 else " ".join("?" * len(array.shape))
