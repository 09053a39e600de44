"""The front end for any other library: a params pytree in, a params pytree with W + delta_W out.

    model = get_peft_model(params, config, views={"mlp/linear_.*": "i o"})
    apply_fn(model.merged(model.variables), x)

Nothing is known of the layers but what `views` states, so every kernel is merged before the model
runs: what the model keeps for its backward pass holds W + delta_W, unless the user rematerialises.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from randlora_jax.core.update import holds_sums
from randlora_jax.front_ends.collections import (
    CollectionStore,
    Tree,
    adapter_trees,
    part_of,
    state_of,
)
from randlora_jax.front_ends.functional import FunctionalRandLora
from randlora_jax.front_ends.params import is_box, unboxed
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models import adapter_arrays
from randlora_jax.models.finding import FoundModule, find_layers
from randlora_jax.models.front_end import WrapRules, register_front_end
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.quantised import array_of
from randlora_jax.models.registry import (
    AdapterRegistry,
    AdapterSpec,
    AdapterState,
    BaseModelInfo,
)


class PytreeStore(CollectionStore):
    """Collections whose "params" are any pytree of arrays."""

    _step = staticmethod(part_of)

    def __init__(self, params: Tree) -> None:
        super().__init__({"params": params})
        self._learn()

    def _learn(self) -> None:
        """Where the arrays of the params lie."""
        self.paths = list(_by_path(self.base["params"]))
        tree = jax.tree.structure(self.base["params"])  # which cannot be pickled itself
        self.places = jax.tree.unflatten(tree, range(len(self.paths)))

    def leaves_of(self, params: Tree) -> dict[Path, jax.Array]:
        """The arrays of `params` by path.

        Raises:
          ConfigError: `params` has not the paths of what was wrapped.
        """
        leaves = _by_path(params)
        strange = [dotted(path) for path in leaves.keys() ^ set(self.paths)]
        if strange:
            raise ConfigError(
                f"params: expected a pytree as it was wrapped; {listed(sorted(strange))} are in "
                "only one of the two"
            )
        return leaves

    def tree_of(self, leaves: Mapping[Path, jax.Array]) -> Tree:
        """The reverse of `leaves_of`."""
        return jax.tree.map(lambda place: leaves[self.paths[place]], self.places)

    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Of the params."""
        return self.leaves_of(self.base["params"])

    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In a new tree."""
        self.base = {"params": self.tree_of({**self.base_leaves(), **leaves})}

    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In a new tree, of another structure."""
        super().put_floats(leaves)
        self._learn()

    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """As any collections, but dropout has no input to act on."""
        if spec.dropout:
            raise ConfigError(
                f"randlora_dropout={spec.dropout} needs to see a layer's input, and a params "
                "pytree has none; set it to 0"
            )
        super().install(registry, spec, state, rngs)

    def release(self) -> Tree:
        """The params."""
        return self.base["params"]


def _by_path(params: Tree) -> dict[Path, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    return {tuple(map(part_of, keys)): unboxed(leaf) for keys, leaf in leaves}


def _unmergeable(arrays: Mapping[Path, Any]) -> dict[Path, str]:
    """Why arrays that cannot take a delta take no adapter."""
    return {
        leaf: f"it holds {x.dtype} numbers, which a float update cannot join, and a params pytree "
        "is merged before the model runs: hold it in floats (qwix.dequantize), or wrap the flax "
        "model"
        for leaf, x in arrays.items()
        if not holds_sums(x.dtype)
    }


def _accepts(model: Any, rules: WrapRules) -> bool:
    kinds = jax.Array, np.ndarray, jax.ShapeDtypeStruct
    return bool(rules.layouts.rules) and any(isinstance(x, kinds) for x in jax.tree.leaves(model))


@register_front_end("a pytree of arrays with views= of its kernels", accepts=_accepts)
class PytreeRandLora(FunctionalRandLora):
    """A params pytree with adapters; ``model.variables`` holds the collections."""

    _collections: PytreeStore

    def __init__(self, params: Tree, rules: WrapRules) -> None:
        if rules.options.apply == "factored":
            raise ConfigError(
                "apply='factored' needs to see a layer's input, and a params pytree has none; "
                "use 'auto' or 'merged'"
            )
        if rules.layer_types:
            raise ConfigError(
                "layer_types: a params pytree has no modules whose types could be told; state the "
                "layouts of its kernels by views="
            )
        self._collections = store = PytreeStore(params)
        owned: dict[Path, dict[Path, jax.Array]] = {}
        for path, leaf in store.base_leaves().items():
            if not path:
                raise ConfigError(
                    "params are one array without a name: hold it in a dict, such as "
                    "{'layer': {'kernel': array}}"
                )
            if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
                raise ConfigError(
                    f"params {dotted(path)!r} is a {type(leaf).__name__}: expected arrays alone; "
                    "take the rest out first, such as by equinox.partition(model, is_array)"
                )
            owner = array_of(path)[:-1]
            owned.setdefault(owner, {})[path[len(owner) :]] = leaf
        modules = (
            FoundModule(path, arrays, refusals=_unmergeable(arrays))
            for path, arrays in owned.items()
        )
        found = find_layers(modules, rules.layouts, rules.names)
        options = replace(rules.options, apply="merged")  # there is no other way
        self._registry = AdapterRegistry.of(
            found, BaseModelInfo(), rules.names, options, rules.optional
        )

    @property
    def _base_name(self) -> str:
        return "a params pytree"

    def stack_adapters(self, capacity: int | None = None, *, parts: int = 1) -> None:
        """Not here.

        Raises:
          ConfigError: always: rows of a batch cannot take each its own of params with W + delta.
        """
        raise ConfigError(
            "stack_adapters: a params pytree gives out params with W + delta, one for all rows of "
            "a batch, so no row can have an adapter of its own: wrap the flax model, or call "
            "set_adapter(name) and merged(model.variables) for each adapter"
        )

    @property
    def params(self) -> Tree:
        """The base model's own, frozen."""
        return self._collections.release()

    def _params_of(self, variables: Mapping[str, Any]) -> Mapping[Path, Any]:
        return self._collections.leaves_of(variables["params"])

    def merged(self, variables: Mapping[str, Any]) -> Tree:
        """The params with the active adapters' deltas added: formed in float32, rounded once.

        A pure function of `variables`, to be called inside ``jit`` and ``grad``.

        Raises:
          ConfigError: `variables` lack something, or hold what is not this model's.
        """
        variables = self._checked(variables)
        store = self._collections
        leaves = store.leaves_of(variables["params"])
        trees = adapter_trees(variables) if self._registry.applied else {}
        states = {name: state_of(tree) for name, tree in trees.items()}
        whole = adapter_arrays.trained_whole(states)
        leaves |= {path: x.astype(leaves[path].dtype) for path, x in whole.items()}
        pairs = self._pairs_of(variables)
        updates = adapter_arrays.updates_by_layer(self._registry, states, pairs)
        leaves |= adapter_arrays.merged_kernels(self._registry, leaves, updates, traced=True)
        return store.tree_of(leaves)
