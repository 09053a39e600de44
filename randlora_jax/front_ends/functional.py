"""A wrapped model that is a function of its variables: what it takes, and what it refuses.

Variables are trees that users take apart, save and put together again, so whatever can be missing
or not fit is looked for before anything runs: as for all that only shapes decide, under ``jit``
this costs nothing after tracing.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.bases import BasisPair, Extents
from randlora_jax.core.frozen import never_trained
from randlora_jax.front_ends.collections import (
    FROZEN,
    GAMMA,
    LAMBDA,
    PAIRS,
    TRAINED,
    CollectionStore,
    adapter_trees,
    as_arrays,
    base_arrays,
    base_collections,
    refuse_abstract,
    state_of,
)
from randlora_jax.front_ends.params import flat
from randlora_jax.interop.errors import ConfigError, listed, shown, warn
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.registry import AdapterRegistry, AdapterState

_WHOLE = (
    "{**frozen, 'randlora': trained} is whole, where trained, frozen = model.split(), and so is "
    "model.variables"
)

_TRAINED_ALONE = "variables['randlora'], the first of trained, frozen = model.split()"


class FunctionalRandLora(RandLoraModel):
    """A model that is a function of its variables.

    `_collections` holds them; what the base model's own are, its front end says.
    """

    _collections: CollectionStore

    @property
    def _store(self) -> CollectionStore:
        return self._collections

    @property
    def variables(self) -> dict[str, Any]:
        """Every collection; assign it back after training."""
        registry, store = self._registry, self._collections
        trees = {name: self._tree(name) for name in registry.applied}
        trained = {n: tree for n, tree in trees.items() if n in registry.training}
        frozen = {n: tree for n, tree in trees.items() if n not in trained}
        return {**store.base, TRAINED: trained, FROZEN: frozen, PAIRS: dict(store.pairs())}

    @variables.setter
    def variables(self, variables: Mapping[str, Any]) -> None:
        _check_kind(variables)
        lost = [name for name, held in self.variables.items() if held and name not in variables]
        if lost:
            raise ConfigError(
                f"the variables lack the collections {listed(lost)}, which would be lost: {_WHOLE}"
            )
        self._check_adapters(variables)
        store = self._collections
        for name, tree in adapter_trees(as_arrays(unfreeze(variables))).items():
            # of a merged adapter, lambda and gamma are no variables, and stay
            leaves = {**flatten_dict(store.trees[name]), **flatten_dict(tree)}
            store.trees[name] = unflatten_dict(leaves)
        store.base = base_arrays(unfreeze(base_collections(variables)))
        if any(map(_is_gone, jax.tree.leaves(store.pairs()))):
            self._refresh_pairs(store)

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what an optimizer trains, all other collections): pytrees of arrays.

        ``{**frozen, "randlora": trained}`` is the whole again, what `apply` takes.
        """
        frozen = self.variables
        return frozen.pop(TRAINED), frozen

    def _tree(self, adapter_name: str) -> dict[str, Any]:
        """An adapter's leaves; those whose delta is merged into the kernels left out."""
        tree = self._collections.trees[adapter_name]
        if adapter_name not in self._registry.merged:
            return tree
        leaves = flatten_dict(tree)
        return unflatten_dict({p: x for p, x in leaves.items() if p[-1] not in (LAMBDA, GAMMA)})

    def _checked(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        """`variables`, if this model can run with them.

        Raises:
          ConfigError: the bases or other parts are missing, or something in them is not this
            model's, or has no numbers yet.

        Warns where the trained leaves are missing, so that the base model runs.
        """
        _check_kind(variables)
        refuse_abstract(variables)
        registry, given = self._registry, adapter_trees(variables)
        lost = [n for n in registry.applied if n not in registry.merged and n not in given]
        if lost:
            homes = {n: TRAINED if n in registry.training else FROZEN for n in lost}
            gone = [name for name in dict.fromkeys(homes.values()) if name not in variables]
            what = f"no collection {listed(gone)}" if gone else "nothing of them"
            warn(
                f"the variables have {what}, so the model runs without the adapters "
                f"{listed(lost)}: {_WHOLE}. (To run the base model, call it within "
                "model.disable_adapter())"
            )
        if registry.applied:
            self._check_adapters(variables)
        return variables

    def _check_adapters(self, variables: Mapping[str, Any]) -> None:
        """What `variables` have of adapters is this model's, and the bases they need are there."""
        params = self._params_of(variables)
        for name, tree in adapter_trees(variables).items():
            if name not in self._registry.specs:
                raise ConfigError(
                    f"no adapter named {shown(name)}, whose leaves the variables hold; this model "
                    f"has {listed(sorted(self._registry.specs))}: add it first"
                )
            merged = name in self._registry.merged
            _check_leaves(name, tree, self._collections.trees[name], merged=merged)
            state = state_of(tree)
            if state.layers:
                _check_pair(self._registry, name, state, variables)
            needed = [self._registry.layers[layer].kernel_path for layer in state.layers]
            lost = [path for path in [*needed, *state.saved] if path not in params]
            if lost:
                raise ConfigError(
                    f"variables: 'params' lack {listed(list(map(dotted, lost)))}, which adapter "
                    f"{name!r} adapts or trains whole: {_WHOLE}"
                )

    def _pairs_of(self, variables: Mapping[str, Any]) -> Mapping[str, BasisPair]:
        """The bases in `variables`."""
        return never_trained(variables.get(PAIRS, {}), _TRAINED_ALONE)

    def _params_of(self, variables: Mapping[str, Any]) -> Mapping[Path, Any]:
        """The base model's leaves in `variables` by path."""
        if not isinstance(variables["params"], Mapping):
            raise ConfigError(
                f"variables: 'params': expected a dict, found {shown(variables['params'])}: "
                f"{_WHOLE}"
            )
        return flat(variables["params"])


def _is_gone(array: Any) -> bool:
    """Whether an array was donated to a jitted function, or is a shape that waits for numbers."""
    return is_abstract(array) or (not isinstance(array, jax.core.Tracer) and array.is_deleted())


def _check_kind(variables: Any) -> None:
    """A dict of collections, params among them; the adapters' own are dicts."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = listed(sorted(variables)) if isinstance(variables, Mapping) else shown(variables)
        raise ConfigError(
            f"variables: expected a dict of collections, 'params' among them, found {found}: "
            f"{_WHOLE}"
        )
    for collection in (TRAINED, FROZEN, PAIRS):
        held = variables.get(collection, {})
        kinds = Mapping | tuple if collection == PAIRS else Mapping  # a pair is a tuple
        if not (isinstance(held, Mapping) and all(isinstance(x, kinds) for x in held.values())):
            raise ConfigError(
                f"variables: {collection!r}: expected a dict of trees, found {shown(held)}"
            )


def _check_leaves(name: str, tree: Any, kept: Mapping[str, Any], *, merged: bool) -> None:
    """An adapter's tree has the leaves and the shapes of the one that is kept.

    Args:
      merged: lambda and gamma may be left out, since their delta is in the kernels.
    """
    found = {path: np.shape(x) for path, x in flatten_dict(unfreeze(tree)).items()}
    expected = {path: np.shape(x) for path, x in flatten_dict(kept).items()}
    needed = [p for p in expected if not (merged and p[-1] in (LAMBDA, GAMMA))]
    for path in [*needed, *found]:
        theirs, ours = (
            f"of shape {shapes[path]}" if path in shapes else "none" for shapes in (found, expected)
        )
        if theirs != ours:
            raise ConfigError(
                f"adapter {name!r}: {dotted(path)!r}: expected {ours}, found {theirs}: these are "
                f"the leaves of another adapter, or not all of them; {_WHOLE}"
            )


def _check_pair(
    registry: AdapterRegistry, name: str, state: AdapterState, variables: Mapping[str, Any]
) -> None:
    """The pair of bases that an adapter's layers slice is in `variables`, and is large enough."""
    spec = registry.specs[name]
    identity, pairs = str(spec.identity), variables.get(PAIRS)
    if pairs is None or identity not in pairs:
        found = "no such collection" if pairs is None else listed(sorted(pairs)) or "none"
        raise ConfigError(
            f"variables: expected the bases {identity!r} of adapter {name!r} in {PAIRS!r}, found "
            f"{found}: {_WHOLE}"
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
            f"(r, {needed.min}) and ({needed.max}, {needed.n}, r) of them: {_WHOLE}"
        )
