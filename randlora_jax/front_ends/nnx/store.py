"""Where a wrapped nnx model keeps its arrays: in the modules they belong to, as Variables.

Each question is answered by one walk over the model, whatever the number of layers asked about.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol, cast

import jax
from flax import nnx

from randlora_jax.core.abstract import moved
from randlora_jax.core.bases import BasisPair
from randlora_jax.front_ends.nnx.bridges import bridge_of
from randlora_jax.front_ends.nnx.call import ModelToken
from randlora_jax.front_ends.nnx.layer import RandLoraLayer, Settings
from randlora_jax.front_ends.nnx.nested import wrappers_of_wrapped
from randlora_jax.front_ends.nnx.variables import (
    FrozenAdapterParam,
    FrozenLoRAParam,
    SharedBasis,
    retype_loras,
)
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models import reaching
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.quantised import (
    dequantised,
    is_quantised,
    quantiser_around,
    unquantised_class,
)
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.store import ArrayStore


class Root(Protocol):
    """The wrapper around a whole model, which alone holds the bases.

    It expects that a call of the whole model reaches some layers, by name.
    """

    model: nnx.Module
    randlora_bases: dict[str, dict[str, SharedBasis]]
    _token: ModelToken
    _expected: frozenset[str]
    _registry: AdapterRegistry


class NnxStore(ArrayStore):
    """The arrays of one wrapped model: for one operation, after which modules may change again.

    Args:
      root: the wrapper around the whole model.
    """

    def __init__(self, root: Root) -> None:
        self.root = root

    @cached_property
    def _modules(self) -> dict[Path, nnx.Module]:
        """Every module by its path in the base model: a wrapper, where one stands around it."""
        found: dict[Path, nnx.Module] = {}
        for path, module in nnx.iter_modules(self.root.model):
            bare = _bare(path)
            if bare not in found or self._is_ours(module):
                found[bare] = module
        return found

    def _is_ours(self, module: nnx.Module) -> bool:
        """Whether a module is a wrapper of this model, not of one wrapped inside it."""
        ours = isinstance(module, RandLoraLayer) and module.settings.model == self.root._token
        return ours and id(module) not in self._of_others

    @cached_property
    def _of_others(self) -> set[int]:
        """The ``id`` of each wrapper of a model that is wrapped inside this one."""
        modules = [module for _, module in nnx.iter_modules(self.root.model)]
        return wrappers_of_wrapped(modules)

    def modules(self) -> Mapping[Path, nnx.Module]:
        """By path in the base model; a wrapper in place of what it wraps."""
        return self._modules

    def _wrappers(self) -> dict[Path, RandLoraLayer]:
        found = {path: module for path, module in self._modules.items() if self._is_ours(module)}
        return cast(dict[Path, RandLoraLayer], found)

    @cached_property
    def _params(self) -> dict[Path, nnx.Variable[jax.Array]]:
        kernels = {layer.kernel_path for layer in self.root._registry.layers.values()}
        flat = nnx.to_flat_state(nnx.state(self.root.model))
        bare = {_bare(path): leaf for path, leaf in flat if not _OURS & set(path)}
        return {p: x for p, x in bare.items() if isinstance(x, nnx.Param) or p in kernels}

    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Every ``nnx.Param`` of the base model, and kernels of other types."""
        return {path: leaf.get_raw_value() for path, leaf in self._params.items()}

    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In place."""
        for path, value in leaves.items():
            self._params[path][...] = value

    def _quantised(self) -> dict[Path, nnx.Module]:
        """The module that holds each quantised array, by the array's path."""
        modules = {p: m.base_layer if self._is_ours(m) else m for p, m in self._modules.items()}
        return {
            (*path, name): module
            for path, module in modules.items()
            for name, value in vars(module).items()
            if is_quantised(value)
        }

    def dequantised(self) -> Mapping[Path, jax.Array]:
        """Attributes of modules."""

        def plain(x: Any) -> Any:
            return x.get_raw_value() if isinstance(x, nnx.Variable) else x

        def numbers(path: Path, module: nnx.Module) -> jax.Array:
            held = getattr(module, str(path[-1]))
            raw = jax.tree.map(plain, held, is_leaf=lambda x: isinstance(x, nnx.Variable))
            return dequantised(path, raw)

        return {path: numbers(path, module) for path, module in self._quantised().items()}

    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """As ``nnx.Param``; modules whose class quantises get the one it was made of."""
        holders = self._quantised()
        for path, value in leaves.items():
            setattr(holders[path], str(path[-1]), nnx.Param(value))
        for _, module in nnx.iter_modules(self.root.model):
            module.__class__ = unquantised_class(type(module))

    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """In the wrappers of the layers concerned, made where there are none."""
        if spec.dropout and rngs is None:
            raise ConfigError(
                f"randlora_dropout={spec.dropout} draws at random: pass rngs=nnx.Rngs(seed)"
            )
        rngs = nnx.Rngs(rngs) if isinstance(rngs, jax.Array) else rngs
        layers = [registry.layers[name] for name in state.layers]
        owners = {path: self._owner(path) for path in state.saved}
        self._wrap({*(layer.owner for layer in layers), *owners.values()}, registry)
        wrappers = self._wrappers()
        for layer in layers:
            wrapper, key = wrappers[layer.owner], slashed(layer.leaf)
            for held, value in zip(wrapper.held()[:2], state.layers[layer.name], strict=True):
                along = FrozenAdapterParam(moved(layer.layout.along_stack, value))
                held.setdefault(spec.name, {})[key] = along
            if spec.dropout:
                wrapper.randlora_dropout[spec.name] = nnx.Dropout(spec.dropout, rngs=rngs)
        for path, value in state.saved.items():
            owner = owners[path]
            leaves = wrappers[owner].trained_leaves.setdefault(spec.name, {})
            leaves[slashed(path[len(owner) :])] = FrozenAdapterParam(value)

    def _owner(self, path: Path) -> Path:
        """The module that holds the leaf at `path`, itself or in a container."""
        owner = path[:-1]
        while owner and isinstance(self._modules.get(owner), nnx.List | nnx.Dict | None):
            owner = owner[:-1]
        return owner

    def _wrap(self, paths: Iterable[Path], registry: AdapterRegistry) -> None:
        """Puts a wrapper around every module at `paths` that has none."""
        modules = self._modules
        bare = {path: modules[path] for path in paths if not self._is_ours(modules[path])}
        layers: dict[Path, list[Layer]] = {}
        for layer in registry.layers.values():
            layers.setdefault(layer.owner, []).append(layer)
        made = {}
        for path, module in bare.items():
            around = (modules.get(path[:i]) for i in range(len(path), -1, -1))
            settings = Settings(
                tuple(layers.get(path, ())),
                registry.options,
                self.root._token,
                quantiser=quantiser_around(map(type, around)),
            )
            made[path] = _wrapper_of(module)(module, settings)
        replace_modules(
            cast(nnx.Module, self.root), {id(bare[path]): wrapper for path, wrapper in made.items()}
        )
        modules.update(made)

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """Paths of the base model's leaves, by how they are written."""
        return {slashed(path): path for path in self._params}

    def remove(self, adapter_name: str) -> None:
        """From every wrapper."""
        for wrapper in self._wrappers().values():
            for held in wrapper.held():
                held.pop(adapter_name, None)

    def state(self, adapter_name: str) -> AdapterState:
        """From every wrapper."""
        state = AdapterState({})
        for path, wrapper in self._wrappers().items():
            lams, gammas = (held.get(adapter_name, {}) for held in wrapper.held()[:2])
            for layer in wrapper.settings.layers:
                if (key := slashed(layer.leaf)) in lams:
                    both = lams[key].get_raw_value(), gammas[key].get_raw_value()
                    lam, gamma = (moved(layer.layout.stack_first, x) for x in both)
                    state.layers[layer.name] = lam, gamma
            whole = wrapper.trained_leaves.get(adapter_name, {})
            for leaf, value in whole.items():
                state.saved[self._paths[slashed((*path, leaf))]] = value.get_raw_value()
        return state

    def set_pairs(self, pairs: Mapping[str, BasisPair]) -> None:
        """In the root."""
        self.root.randlora_bases = nnx.data(
            {i: {"A": SharedBasis(p.A), "B": SharedBasis(p.B)} for i, p in pairs.items()}
        )

    def pairs(self) -> Mapping[str, BasisPair]:
        """Of the root."""
        return {
            identity: BasisPair(held["A"].get_raw_value(), held["B"].get_raw_value())
            for identity, held in self.root.randlora_bases.items()
        }

    def follow(self, registry: AdapterRegistry) -> None:
        """Every wrapper does."""
        applied: list[Layer] = []
        for wrapper in self._wrappers().values():
            wrapper.follow(registry)
            applied += [layer for layer, _ in wrapper.applied()]
        self.root._expected = frozenset(reaching.expected(applied, registry.optional))

    def release(self) -> Any:
        """The base model, its own modules back in place of their wrappers."""
        wrappers = self._wrappers().values()
        root = cast(nnx.Module, self.root)
        replace_modules(root, {id(wrapper): wrapper.base_layer for wrapper in wrappers})
        retype_loras(list(nnx.iter_modules(self.root.model)), FrozenLoRAParam, nnx.LoRAParam)
        return self.root.model


def _wrapper_of(module: nnx.Module) -> type[RandLoraLayer]:
    bridge = bridge_of(module)
    return bridge.wrapper if bridge else RandLoraLayer


def _bare(path: Path) -> Path:
    """A path in the base model, from one in the wrapped model."""
    return tuple(part for part in path if part != "base_layer")


# What a wrapper holds besides the module in whose place it stands.
_OURS = {"randlora_lambda", "randlora_gamma", "trained_leaves", "randlora_dropout"}


def replace_modules(root: nnx.Module, new: Mapping[int, nnx.Module]) -> None:
    """Puts new modules in place of old ones wherever `root` holds these, in one walk.

    Args:
      new: by the ``id`` of the old module, which must live on.
    """
    for module in [module for _, module in nnx.iter_modules(root)]:
        for name, value in list(vars(module).items()):
            swapped = _swapped(value, new)
            if swapped is value:
                continue
            if isinstance(module, nnx.List):
                module[int(name)] = swapped  # flax 0.12.2 has no attributes for its items
            else:
                setattr(module, name, swapped)


def _swapped(value: Any, new: Mapping[int, nnx.Module]) -> Any:
    """`value` with modules replaced, inside containers too; itself if nothing changed."""
    if id(value) in new:
        return new[id(value)]
    if type(value) in (list, tuple):
        parts = [_swapped(v, new) for v in value]
        return value if all(map(lambda a, b: a is b, parts, value)) else type(value)(parts)
    if type(value) is dict:
        items = {k: _swapped(v, new) for k, v in value.items()}
        return value if all(items[k] is value[k] for k in value) else items
    return value
