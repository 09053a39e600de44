"""The arrays of an adapted model as collections: what trains, what does not, the bases once.

    {"params": ...,                       the base model, frozen, untouched
     "randlora": {adapter: tree},         what an optimizer trains
     "randlora_frozen": {adapter: tree},  adapters that are applied but not trained; what one that
                                          trains carries of the base model
     "randlora_bases": {identity: pair},  the shared bases, once
     "randlora_specs": {adapter: Known}}  what no array tells of them

For front ends of functional libraries, whose models are functions of such a tree.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.bases import BasisPair
from randlora_jax.front_ends.params import boxed_as, flat, is_box, step_of, unboxed, with_leaves
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.front_end import ADAPTED_ALREADY
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.quantised import arrays_in, dequantised, integers_in, is_quantised
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.slots import SlotTable
from randlora_jax.models.store import ArrayStore

Tree = Any

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
OWN = "randlora_own"  # beside a stack's leaves that were trained whole: which adapters trained them
TRAINED, FROZEN, PAIRS = "randlora", "randlora_frozen", "randlora_bases"
SLOTS = "randlora_slots"  # what the slots of stacked adapters stand for
SPECS = "randlora_specs"
OURS = TRAINED, FROZEN, PAIRS, SLOTS, SPECS


@jax.tree_util.register_static
@dataclass(frozen=True)
class Known:
    """What no array tells of an adapter in `variables`: its strength, dropout and bases.

    A pytree without leaves, so that nothing trains it, while variables of another adapter of that
    name are another tree: a compiled function notices by itself.

    Args:
      place: among the adapters of these variables, which numbers their slots where rows choose.
      merged: the kernels hold its delta.
    """

    spec: AdapterSpec
    place: int
    merged: bool


# flax's own files of variables hold nothing of it either
serialization.register_serialization_state(Known, lambda known: {}, lambda known, state: known)


class CollectionStore(ArrayStore):
    """Keeps a base model's own collections, and a tree for each adapter beside them.

    Raises:
      ConfigError: they are not a base model's own, or are no arrays.
    """

    _step = staticmethod(step_of)  # of the paths of leaves

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base_arrays(base)
        self.trees: dict[str, dict[str, Any]] = {}
        self._pairs: dict[str, BasisPair] = {}
        self._slots: SlotTable | None = None

    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Of the collection "params", out of their boxes."""
        return {path: unboxed(leaf) for path, leaf in flat(self.base["params"]).items()}

    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In a new tree: the one that the user handed in stays as it is."""
        self.base = {**self.base, "params": with_leaves(self.base["params"], leaves)}

    def dequantised(self) -> Mapping[Path, jax.Array]:
        """Leaves of the collection "params", out of their boxes."""
        leaves = jax.tree_util.tree_leaves_with_path(self.base["params"], is_leaf=is_quantised)
        found = {self._integers(keys, leaf): leaf for keys, leaf in leaves if is_quantised(leaf)}
        bare = {path: jax.tree.map(unboxed, leaf, is_leaf=is_box) for path, leaf in found.items()}
        return {path: dequantised(path, leaf) for path, leaf in bare.items()}

    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In a new tree, each in a box like that of the integers."""

        def found(keys: tuple[Any, ...], held: Any) -> Any:
            place = integers_in(held)
            path = self._integers(keys, held)
            if place is None or path not in leaves:
                return held
            return boxed_as(arrays_in(held)[place], leaves[path])

        params = self.base["params"]
        params = jax.tree_util.tree_map_with_path(found, params, is_leaf=is_quantised)
        self.base = {**self.base, "params": params}

    def _integers(self, keys: tuple[Any, ...], leaf: Any) -> Path:
        """The path of the integers of a quantised leaf."""
        return (*map(self._step, keys), *(integers_in(leaf) or ()))

    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """Lambda and gamma by the path of their layer; dropout draws from linen's own rngs."""
        leaves = {**state.saved, **{(OWN, *path): told for path, told in state.own.items()}}
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

    def set_slots(self, table: SlotTable | None) -> None:
        """One collection."""
        self._slots = table

    def slots(self) -> SlotTable | None:
        """As they were set."""
        return self._slots

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
    whole = {path: x for path, x in leaves.items() if path[-1] not in (LAMBDA, GAMMA)}
    saved = {path: x for path, x in whole.items() if path[0] != OWN}
    own = {path[1:]: x for path, x in whole.items() if path[0] == OWN}
    return AdapterState(layers, saved, own)


def adapter_trees(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of every adapter, or stack of some, in `variables`, trained or frozen."""
    frozen, trained = variables.get(FROZEN, {}), variables.get(TRAINED, {})
    both = {name: [frozen[name], trained[name]] for name in frozen if name in trained}
    parts = {name: [flatten_dict(unfreeze(tree)) for tree in trees] for name, trees in both.items()}
    whole = {name: unflatten_dict({**carried, **rest}) for name, (carried, rest) in parts.items()}
    return {**frozen, **trained, **whole}


def without_carried(
    tree: Mapping[str, Any], carried: Collection[Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An adapter's tree without the leaves at the paths `carried`, and these."""
    leaves = flatten_dict(tree)
    ours = {path: x for path, x in leaves.items() if path not in carried}
    theirs = {path: x for path, x in leaves.items() if path in carried}
    return unflatten_dict(ours), unflatten_dict(theirs)


def base_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What of `variables` is the base model's own."""
    return {k: v for k, v in variables.items() if k not in OURS}


def base_arrays(collections: Mapping[str, Any]) -> dict[str, Any]:
    """A base model's own collections, with JAX's arrays for NumPy's.

    Raises:
      ConfigError: there are no params, or adapters are among them.
    """
    if "params" not in collections:
        raise ConfigError(
            f"the model has the collections {listed(sorted(collections))}: expected 'params' among "
            "them; bind a linen module to {'params': params}, or to all that module.init gives"
        )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(dict(collections))]
    parts = [tuple(map(part_of, path)) for path in paths]
    held = [name for name in OURS if name in collections]
    ours = {LAMBDA, GAMMA, *OURS}
    held += [dotted(path) for path in parts if ours & set(path[1:])]
    if held:
        raise ConfigError(
            f"these are the variables of a model that is wrapped already: they hold "
            f"{listed(held, 3)}. {ADAPTED_ALREADY}"
        )
    return as_arrays(dict(collections))


def as_arrays(tree: Tree) -> Tree:
    """`tree` with JAX's arrays for NumPy's, as checkpoints give them back."""

    def converted(x: Any) -> Any:
        is_numpy = isinstance(x, np.ndarray | np.generic)
        is_numbers = is_numpy and (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool)
        return jnp.asarray(x) if is_numbers else x

    return jax.tree.map(converted, tree)


def refuse_abstract(collections: Tree) -> None:
    """Nothing, if every leaf is an array.

    Raises:
      ConfigError: one is abstract.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(collections):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ConfigError(
                f"{dotted(tuple(map(part_of, path)))!r} is abstract, a ShapeDtypeStruct: run the "
                "model abstractly, within jax.eval_shape(lambda variables: ..., model.variables), "
                "or fill it first with variables that were restored: model.variables = variables"
            )


def part_of(key: Any) -> str:
    """One step of a path as users write it: a dict's key, an attribute's name, an index."""
    return str(step_of(key))
