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
import jax.numpy as jnp

from randlora_jax.core.delta import Term
from randlora_jax.core.kernel_layout import Views
from randlora_jax.core.layers import AdapterSpec, How, kernel_delta
from randlora_jax.core.mesh import layout_of
from randlora_jax.front_ends.collections import BASES, FROZEN, TRAINED, FunctionalRandLora
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer_types import layer_at
from randlora_jax.models.names import Names, Path, dotted
from randlora_jax.models.registry import AdapterState, Book, Origin

Tree = Any


class PytreeRandLora(FunctionalRandLora):
    """A params pytree with adapters; ``model.variables`` as its base class has them."""

    def __init__(self, params: Tree, how: How, views: Views, names: Names) -> None:
        if how.apply == "factored":
            raise ConfigError(
                "apply='factored' needs to see a layer's input, and a params pytree has none; "
                "use 'auto' or 'merged'"
            )
        leaves, self._treedef = jax.tree_util.tree_flatten_with_path(params)
        self._paths: list[Path] = [tuple(map(_part, keys)) for keys, _ in leaves]
        self._begin({"params": params})
        owned: dict[Path, dict[str, jax.Array]] = {}
        for path, (_, leaf) in zip(self._paths, leaves, strict=True):
            if not isinstance(leaf, jax.Array):
                raise ConfigError(
                    f"params {dotted(path)!r} is a {type(leaf).__name__}: expected arrays alone; "
                    "take the rest out first, such as by equinox.partition(model, is_array)"
                )
            owned.setdefault(path[:-1], {})[path[-1]] = leaf
        found = {p: layer_at(p, s, None, views.find(p), names) for p, s in owned.items()}
        layers = {layer.name: layer for layer in found.values() if layer}
        modules = {names.first(path) for path, layer in found.items() if not layer}
        how = replace(how, apply="merged")  # there is no other way
        self._book = Book(layers, tuple(sorted(modules)), names, Origin(), how)

    def merged(self, variables: Mapping[str, Any]) -> Tree:
        """The params with the active adapters' deltas added: formed in float32, rounded once.

        A pure function of `variables`, to be called inside ``jit`` and ``grad``.
        """
        leaves = dict(zip(self._paths, jax.tree.leaves(variables["params"]), strict=True))
        book = self._book
        terms: dict[str, list[Term]] = {}
        trees = {**variables.get(FROZEN, {}), **variables.get(TRAINED, {})}
        for adapter, tree in trees.items():
            spec, state = book.specs[adapter], self._state_of(tree)
            bases = variables[BASES][str(spec.identity)]
            for path, value in state.saved.items():
                leaves[path] = value.astype(leaves[path].dtype)
            for name, (lam, gamma) in state.layers.items():
                terms.setdefault(name, []).append(Term(lam, gamma, bases, spec.scaling))
        for name, mine in terms.items():
            path, kernel = book.layers[name].kernel_path, leaves[book.layers[name].kernel_path]
            view = book.layers[name].view
            layout = layout_of(kernel, view, book.layers[name].sharding)
            change = kernel_delta(mine, view, kernel.shape, layout)
            leaves[path] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
        return jax.tree.unflatten(self._treedef, [leaves[path] for path in self._paths])

    # What RandLoraModel asks of a front end.

    def _base_leaves(self) -> Mapping[Path, jax.Array]:
        return dict(zip(self._paths, jax.tree.leaves(self._collections["params"]), strict=True))

    def _set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        new = {**self._base_leaves(), **leaves}
        params = jax.tree.unflatten(self._treedef, [new[path] for path in self._paths])
        self._collections = {"params": params}

    def _install(self, spec: AdapterSpec, state: AdapterState, rngs: Any) -> None:
        if spec.dropout:
            raise ConfigError(
                f"randlora_dropout={spec.dropout} needs to see a layer's input, and a params "
                "pytree has none; set it to 0"
            )
        super()._install(spec, state, rngs)

    def _release(self) -> Tree:
        return self._collections["params"]


def _part(key: Any) -> str:
    """One step of a path as users write it: a dict's key, an attribute's name, an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
