"""The arrays of an adapted model as collections: what trains, what does not, the bases once.

    {"params": ...,                       the base model, frozen, untouched
     "randlora": {adapter: tree},         what an optimizer trains
     "randlora_frozen": {adapter: tree},  adapters that are applied but not trained
     "randlora_bases": {identity: pair}}  the shared bases, once

For front ends of functional libraries, whose models are functions of such a tree.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.bases import BasisPair
from randlora_jax.front_ends.boxes import boxed_as, unboxed
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.store import ArrayStore

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
TRAINED, FROZEN, PAIRS = "randlora", "randlora_frozen", "randlora_bases"


class CollectionStore(ArrayStore):
    """Keeps a base model's own collections, and a tree for each adapter beside them."""

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base
        self.trees: dict[str, dict[str, Any]] = {}
        self._pairs: dict[str, BasisPair] = {}

    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Of the collection "params", out of their boxes."""
        return {path: unboxed(leaf) for path, leaf in flatten_dict(self.base["params"]).items()}

    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In a new tree: the one that the user handed in stays as it is."""
        held = flatten_dict(self.base["params"])
        boxed = {path: boxed_as(held[path], leaf) for path, leaf in leaves.items()}
        self.base = {**self.base, "params": unflatten_dict({**held, **boxed})}

    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """Lambda and gamma by the path of their layer; dropout draws from linen's own rngs."""
        leaves = dict(state.saved)
        for name, (lam, gamma) in state.layers.items():
            path = registry.layers[name].path
            leaves[(*path, LAMBDA)], leaves[(*path, GAMMA)] = lam, gamma
        self.trees[spec.name] = unflatten_dict(leaves)

    def remove(self, adapter_name: str) -> None:
        """Drops its tree."""
        del self.trees[adapter_name]

    def state(self, adapter_name: str) -> AdapterState:
        """What its tree holds."""
        return state_of(self.trees[adapter_name])

    def set_pairs(self, pairs: Mapping[str, BasisPair]) -> None:
        """One collection."""
        self._pairs = dict(pairs)

    def pairs(self) -> Mapping[str, BasisPair]:
        """As they were set."""
        return self._pairs

    def follow(self, registry: AdapterRegistry) -> None:
        """Nothing: what is trained or frozen is told when the variables are asked for."""

    def release(self) -> Any:
        """The collections."""
        return self.base


def state_of(tree: Mapping[str, Any]) -> AdapterState:
    """An adapter's state from its tree."""
    leaves = flatten_dict(unfreeze(tree))
    layers = {
        dotted(path[:-1]): (lam, leaves[(*path[:-1], GAMMA)])
        for path, lam in leaves.items()
        if path[-1] == LAMBDA
    }
    saved = {path: x for path, x in leaves.items() if path[-1] not in (LAMBDA, GAMMA)}
    return AdapterState(layers, saved)


def adapter_trees(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of every adapter in `variables`, trained or frozen."""
    return {**variables.get(FROZEN, {}), **variables.get(TRAINED, {})}


def base_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What of `variables` is the base model's own."""
    return {k: v for k, v in variables.items() if k not in (TRAINED, FROZEN, PAIRS)}


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
        trees = {name: self._tree(name) for name in registry.active}
        trained = {n: trees[n] for n in registry.training}
        frozen = {n: tree for n, tree in trees.items() if n not in trained}
        return {**store.base, TRAINED: trained, FROZEN: frozen, PAIRS: dict(store.pairs())}

    @variables.setter
    def variables(self, variables: Mapping[str, Any]) -> None:
        trees = variables.get(TRAINED, {})
        unknown = set(trees) - set(self._registry.specs)
        if unknown:
            raise ConfigError(
                f"no adapter named {sorted(unknown)}; add it before assigning its leaves"
            )
        self._collections.trees |= trees
        self._collections.base = unfreeze(base_collections(variables))

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
