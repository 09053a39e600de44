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

from randlora_jax.core.bases import Bases, BasisIdentity
from randlora_jax.core.layers import AdapterSpec
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import dotted
from randlora_jax.models.registry import AdapterState

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
TRAINED, FROZEN, BASES = "randlora", "randlora_frozen", "randlora_bases"


class FunctionalRandLora(RandLoraModel):
    """A model that is a function of its variables."""

    _collections: dict[str, Any]  # the base model's own

    def _begin(self, collections: dict[str, Any]) -> None:
        self._collections = collections
        self._trees: dict[str, dict[str, Any]] = {}
        self._bases: dict[str, Bases] = {}

    @property
    def variables(self) -> dict[str, Any]:
        """Every collection that `apply` takes; assign it back after training."""
        book = self._book
        trees = {name: self._tree(name) for name in book.active}
        trained = {n: t for n, t in trees.items() if n in book.trained and n not in book.merged}
        frozen = {n: t for n, t in trees.items() if n not in trained}
        return {**self._collections, TRAINED: trained, FROZEN: frozen, BASES: dict(self._bases)}

    @variables.setter
    def variables(self, variables: Mapping[str, Any]) -> None:
        unknown = set(variables.get(TRAINED, {})) - set(self._trees)
        if unknown:
            raise ConfigError(
                f"no adapter named {sorted(unknown)}; add it before assigning its leaves"
            )
        self._trees |= variables.get(TRAINED, {})
        kept = {k: v for k, v in variables.items() if k not in (TRAINED, FROZEN, BASES)}
        self._collections = unfreeze(kept)

    def _tree(self, adapter_name: str) -> dict[str, Any]:
        """An adapter's leaves; those whose delta is merged into the kernels left out."""
        tree = self._trees[adapter_name]
        if adapter_name not in self._book.merged:
            return tree
        leaves = flatten_dict(tree)
        return unflatten_dict({p: x for p, x in leaves.items() if p[-1] not in (LAMBDA, GAMMA)})

    # What RandLoraModel asks of a front end.

    def _install(self, spec: AdapterSpec, state: AdapterState, rngs: Any) -> None:
        leaves = dict(state.saved)
        for name, (lam, gamma) in state.layers.items():
            path = self._book.layers[name].path
            leaves[(*path, LAMBDA)], leaves[(*path, GAMMA)] = lam, gamma
        self._trees[spec.name] = unflatten_dict(leaves)

    def _remove(self, adapter_name: str) -> None:
        del self._trees[adapter_name]

    def _sync(self) -> None:
        pass  # `variables` follows the book

    def _state(self, adapter_name: str) -> AdapterState:
        return self._state_of(self._trees[adapter_name])

    def _state_of(self, tree: Mapping[str, Any]) -> AdapterState:
        leaves = flatten_dict(unfreeze(tree))
        layers = {
            dotted(path[:-1]): (lam, leaves[(*path[:-1], GAMMA)])
            for path, lam in leaves.items()
            if path[-1] == LAMBDA
        }
        saved = {path: x for path, x in leaves.items() if path[-1] not in (LAMBDA, GAMMA)}
        return AdapterState(layers, saved)

    def _trainable_leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(self.variables[TRAINED])

    def _set_bases(self, bases: Mapping[BasisIdentity, Bases]) -> None:
        self._bases = {str(identity): pair for identity, pair in bases.items()}
