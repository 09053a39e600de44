"""What the parts of a model's variables must be, where users may have put them together."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict

from randlora_jax.core.bases import BasisPair, Extents
from randlora_jax.front_ends.collections import (
    FROZEN,
    GAMMA,
    LAMBDA,
    PAIRS,
    SPECS,
    TRAINED,
    Known,
)
from randlora_jax.interop.errors import ConfigError, listed, shown
from randlora_jax.models.names import dotted
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState

WHOLE = (
    "{**frozen, 'randlora': trained} is whole, where trained, frozen = model.split(), and so is "
    "model.variables"
)


def check_kind(variables: Any) -> None:
    """A dict of collections, params among them; the adapters' own are dicts."""
    kinds = {TRAINED: Mapping, FROZEN: Mapping, PAIRS: Mapping | tuple, SPECS: Known}
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = listed(sorted(variables)) if isinstance(variables, Mapping) else shown(variables)
        raise ConfigError(
            f"variables: expected a dict of collections, 'params' among them, found {found}: "
            f"{WHOLE}"
        )
    for collection, kind in kinds.items():
        held = variables.get(collection, {})
        if not (isinstance(held, Mapping) and all(isinstance(x, kind) for x in held.values())):
            what = "what model.variables has there" if kind is Known else "a dict of trees"
            raise ConfigError(f"variables: {collection!r}: expected {what}, found {shown(held)}")


def check_spec(ours: AdapterSpec, found: Mapping[str, Known]) -> None:
    """Variables were taken of an adapter with the strength, dropout and bases that it has now."""
    if ours.name not in found:
        raise ConfigError(
            f"variables: {SPECS!r}: expected what model.variables has there of adapter "
            f"{ours.name!r}, found {listed(sorted(found)) or 'none'}: without it a compiled "
            "function would go on with the strength of an earlier adapter of that name. "
            f"{{**variables, {SPECS!r}: model.variables[{SPECS!r}]}} is whole"
        )
    theirs = found[ours.name].spec
    for field in fields(ours):
        mine, its = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != its:
            raise ConfigError(
                f"variables: {SPECS!r}: adapter {ours.name!r}: {field.name}: expected {mine}, as "
                f"the model has it, found {its}: the adapter was changed (set_scale, load_adapter) "
                "after these variables were taken, or they are another model's. Take "
                "model.variables again; {**model.variables, 'randlora': trained} has the numbers "
                "of `trained` and is applied as the adapter is now"
            )


def check_merged(ours: Sequence[str], theirs: Sequence[str]) -> None:
    """The kernels in variables hold the deltas of the adapters that a model has merged."""
    if ours != theirs:
        raise ConfigError(
            f"the kernels of these variables have merged the adapters {listed(theirs) or 'none'}, "
            f"and those of this model {listed(ours) or 'none'}: the variables were taken before "
            "merge_adapter or unmerge_adapter was called, and a delta would be lost, or be there "
            "twice. Undo that call first, or assign what was taken of model.variables since. (To "
            "run them without assigning them is right.)"
        )


def check_leaves(name: str, tree: Any, kept: Mapping[str, Any], *, merged: bool) -> None:
    """An adapter's tree has the leaves and the shapes of the one that is kept.

    Args:
      merged: all but lambda and gamma, since their delta is in the kernels.
    """
    found = {path: np.shape(x) for path, x in flatten_dict(unfreeze(tree)).items()}
    expected = {
        path: np.shape(x)
        for path, x in flatten_dict(kept).items()
        if not (merged and path[-1] in (LAMBDA, GAMMA))
    }
    for path in [*expected, *found]:
        theirs, ours = (
            f"of shape {shapes[path]}" if path in shapes else "none" for shapes in (found, expected)
        )
        if theirs != ours:
            why = "these are the leaves of another adapter, or not all of them"
            if merged and path[-1] in (LAMBDA, GAMMA):
                why = "the kernels of these variables have it merged, so its delta would be twice"
            raise ConfigError(
                f"adapter {name!r}: {dotted(path)!r}: expected {ours}, found {theirs}: {why}; "
                f"{WHOLE}"
            )


def check_pair(
    registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, variables: Mapping[str, Any]
) -> None:
    """The pair of bases that an adapter's layers slice is in `variables`, and is large enough."""
    name, identity, pairs = spec.name, str(spec.identity), variables.get(PAIRS)
    if pairs is None or identity not in pairs:
        found = "no such collection" if pairs is None else listed(sorted(pairs)) or "none"
        raise ConfigError(
            f"variables: expected the bases {identity!r} of adapter {name!r} in {PAIRS!r}, found "
            f"{found}: {WHOLE}"
        )
    pair = pairs[identity]
    if not isinstance(pair, BasisPair):
        raise ConfigError(
            f"variables: {PAIRS!r} holds {identity!r} as a {type(pair).__name__}, not as the "
            "BasisPair it was: restore a checkpoint into a tree like model.variables, or take "
            "this collection from there"
        )
    needed = registry.used_extents(spec, state.layers)
    shapes = np.shape(pair.A), np.shape(pair.B)
    fits = (
        len(shapes[0]) == 2
        and len(shapes[1]) == 3
        and needed
        == Extents(
            min(shapes[1][0], needed.max),
            min(shapes[1][1], needed.n),
            min(shapes[0][1], needed.min),
        )
    )
    if not fits:
        raise ConfigError(
            f"variables: the bases {identity!r} have shapes {shapes}; adapter {name!r} needs "
            f"(r, {needed.min}) and ({needed.max}, {needed.n}, r) of them: {WHOLE}"
        )
