"""Where a wrapped nnx model keeps its arrays: in the modules they belong to, as Variables.

Each question is answered by one walk over the model, whatever the number of layers asked about.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any, Protocol, cast

import jax
from flax import nnx

from randlora_jax.core.abstract import moved
from randlora_jax.core.bases import BasisPair
from randlora_jax.front_ends.nnx.base_loras import give_back_loras
from randlora_jax.front_ends.nnx.bridges import bridge_of
from randlora_jax.front_ends.nnx.call import ModelToken
from randlora_jax.front_ends.nnx.dropout import dropout
from randlora_jax.front_ends.nnx.held import (
    arrays_of,
    in_jax,
    is_container,
    of_jax,
    plain,
    quantised_in,
)
from randlora_jax.front_ends.nnx.items import RandLoraItems, has_items
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.leaves import Settings
from randlora_jax.front_ends.nnx.nested import wrappers_of_wrapped
from randlora_jax.front_ends.nnx.replacing import replace_held, with_value
from randlora_jax.front_ends.nnx.variables import (
    AdapterSlots,
    CarriedParam,
    FrozenAdapterParam,
    SharedBasis,
)
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models import drawing, reaching
from randlora_jax.models.filled import refuse_mapped
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, dotted, slashed
from randlora_jax.models.quantised import dequantised, quantiser_around, unquantised_class
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.slots import SlotTable, slots_apart, slots_in_rows
from randlora_jax.models.store import ArrayStore


class Root(Protocol):
    """The wrapper around a whole model, which alone holds the bases.

    It expects that a call of the whole model reaches some layers, by name.
    """

    model: nnx.Module
    randlora_bases: dict[str, dict[str, SharedBasis]]
    randlora_slots: dict[str, AdapterSlots]
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
            bare = self._bare(path)
            if bare not in found or self._is_ours(module):
                found[bare] = module
        return found

    def _bare(self, path: Path) -> Path:
        """A path in the base model, from one in the wrapped model."""
        return tuple(part for i, part in enumerate(path) if path[: i + 1] not in self._wrapped)

    @cached_property
    def _wrapped(self) -> set[Path]:
        """Paths, in the wrapped model, of what stands in wrappers."""
        modules = nnx.iter_modules(self.root.model)
        return {
            (*path, "base_layer") for path, module in modules if isinstance(module, RandLoraLayer)
        }

    def _is_ours(self, module: nnx.Module) -> bool:
        """Whether a module is a wrapper of this model, not of one wrapped inside it."""
        ours = (
            isinstance(module, RandLoraLayer) and module.randlora_settings.model == self.root._token
        )
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
        layers = self.root._registry.layers.values()
        # a Variable may hold more than a kernel
        kernels = {
            path[:i]
            for layer in layers
            for path in [layer.kernel_path]
            for i in range(len(path) + 1)
        }
        flat = nnx.to_flat_state(nnx.state(self.root.model))
        bare = {self._bare(path): leaf for path, leaf in flat if not _OURS & set(path)}
        quantised = {path[:-1] for path in self._quantised}
        return {
            path: x
            for path, x in bare.items()
            if isinstance(x, nnx.Param) or path in kernels or path[:-1] in quantised
        }

    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Every ``nnx.Param`` of the base model, and kernels of other types."""
        return {
            (*path, *inner): in_jax(array)
            for path, leaf in self._params.items()
            for inner, array in arrays_of(leaf).items()
        }

    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """In new Variables: those of now may be another model's, too."""
        self._replace({id(x := self._params[path]): with_value(x, v) for path, v in leaves.items()})

    def _replace(self, new: Mapping[int, Any]) -> None:
        """Puts something in place of what the model holds, by the ``id`` of that."""
        replace_held(cast(nnx.Module, self.root), new)
        for known in ("_params", "_quantised"):
            self.__dict__.pop(known, None)

    @cached_property
    def _quantised(self) -> dict[Path, Any]:
        """What holds each quantised array, a Variable or itself; by the path of its integers."""
        return {
            (*self._bare(path), *leaf): held
            for path, module in nnx.iter_modules(self.root.model)
            if not is_container(module)
            for leaf, held in quantised_in(module).items()
        }

    def dequantised(self) -> Mapping[Path, jax.Array]:
        """Wherever a module holds them."""
        return {path: dequantised(path, plain(held)) for path, held in self._quantised.items()}

    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """As ``nnx.Param``; modules whose class quantises get the one it was made of."""
        held = {path: self._quantised[path] for path in leaves}
        kinds = {p: x if isinstance(x, nnx.Variable) else nnx.Param(None) for p, x in held.items()}
        self._replace({id(x): kinds[p].replace(leaves[p]) for p, x in held.items()})
        for _, module in nnx.iter_modules(self.root.model):
            if bridge := bridge_of(module):
                bridge.unquantise(module)
            if (kind := unquantised_class(type(module))) is not type(module):
                module.__class__ = kind

    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """In the wrappers of the layers concerned, made where there are none."""
        trained = spec.name in registry.trained
        if spec.dropout and trained and rngs is None:
            raise ConfigError(
                f"randlora_dropout={spec.dropout} draws at random: pass rngs=nnx.Rngs(seed)"
            )
        if spec.dropout and rngs is not None:
            drawing.refuse_without(rngs, "dropout", f"randlora_dropout={spec.dropout}")
        rngs = nnx.Rngs(rngs) if isinstance(rngs, jax.Array) else rngs
        layers = [registry.layers[name] for name in state.layers]
        for path in state.saved:
            if path not in self._params:
                raise ConfigError(
                    f"{dotted(path)!r} is to be trained whole and is a part of what one Variable "
                    "holds: hold it in an nnx.Param itself, or leave its module out of "
                    "modules_to_save"
                )
        owners = {path: self._owner(path) for path in state.saved}
        self._wrap({*(layer.owner for layer in layers), *owners.values()}, registry)
        wrappers = self._wrappers()
        drops = {
            layer.owner: dropout(spec.dropout, rngs, wrappers[layer.owner].randlora_settings.layers)
            for layer in layers
            if spec.dropout
        }
        for owner, drop in drops.items():
            drop.deterministic = not trained  # until model.train(), as in PEFT
            wrappers[owner].randlora_dropout[spec.name] = drop
        for layer in layers:
            wrapper, key = wrappers[layer.owner], slashed(layer.leaf)
            for held, value in zip(wrapper._held()[:2], state.layers[layer.name], strict=True):
                one = moved(slots_in_rows, value) if registry.slots_held(spec.name) else value
                along = moved(layer.layout.along_stack, one)
                _put(held.setdefault(spec.name, {}), key, along)
        carried = registry.carried.get(spec.name, ())  # a stack carries nothing
        for path, value in state.saved.items():
            owner = owners[path]
            leaves = wrappers[owner].trained_leaves.setdefault(spec.name, {})
            key = slashed(path[len(owner) :])
            _put(leaves, key, value, CarriedParam if path in carried else FrozenAdapterParam)
            if path in state.own:
                told = wrappers[owner].randlora_own.setdefault(spec.name, {})
                _put(told, key, state.own[path], AdapterSlots)

    def _owner(self, path: Path) -> Path:
        """The module that holds the leaf at `path`, itself or in a container."""
        owner = path[:-1]
        while owner and (owner not in self._modules or is_container(self._modules[owner])):
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
        replace_held(
            cast(nnx.Module, self.root), {id(bare[path]): wrapper for path, wrapper in made.items()}
        )
        modules.update(made)
        self.__dict__.pop("_wrapped", None)

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """Paths of the base model's leaves, by how they are written."""
        return {slashed(path): path for path in self._params}

    def remove(self, adapter_name: str) -> None:
        """From every wrapper."""
        for wrapper in self._wrappers().values():
            for held in wrapper._held():
                held.pop(adapter_name, None)

    def state(self, adapter_name: str) -> AdapterState:
        """From every wrapper."""
        state = AdapterState({})
        slots = self.root._registry.slots_held(adapter_name)
        for path, wrapper in self._wrappers().items():
            lams, gammas = (held.get(adapter_name, {}) for held in wrapper._held()[:2])
            for layer in wrapper.randlora_settings.layers:
                if (key := slashed(layer.leaf)) in lams:
                    both = lams[key].get_raw_value(), gammas[key].get_raw_value()
                    refuse_mapped(layer, both)
                    lam, gamma = (moved(layer.layout.stack_first, x) for x in both)
                    if slots:
                        lam, gamma = (
                            moved(partial(slots_apart, slots=slots), x) for x in (lam, gamma)
                        )
                    state.layers[layer.name] = lam, gamma
            whole = wrapper.trained_leaves.get(adapter_name, {})
            for leaf, value in whole.items():
                state.saved[self._paths[slashed((*path, leaf))]] = value.get_raw_value()
            for leaf, told in wrapper.randlora_own.get(adapter_name, {}).items():
                state.own[self._paths[slashed((*path, leaf))]] = told.get_raw_value()
        return state

    def set_pairs(self, pairs: Mapping[str, BasisPair]) -> None:
        """In the root."""
        self.root.randlora_bases = nnx.data(
            {i: {"A": SharedBasis(p.A), "B": SharedBasis(p.B)} for i, p in pairs.items()}
        )

    def pairs(self) -> Mapping[str, BasisPair]:
        """Of the root."""
        return {
            identity: BasisPair(of_jax(held["A"]), of_jax(held["B"]))
            for identity, held in self.root.randlora_bases.items()
        }

    def set_slots(self, table: SlotTable | None) -> None:
        """In the root; the same Variables where they are there already."""
        held, new = self.root.randlora_slots, table._asdict() if table else {}
        if held.keys() == new.keys():
            for name, x in new.items():
                held[name].set_raw_value(x)
        else:
            slots = {name: AdapterSlots(x) for name, x in new.items()}
            self.root.randlora_slots = nnx.data(slots)

    def slots(self) -> SlotTable | None:
        """Of the root."""
        held = self.root.randlora_slots
        return SlotTable(**{n: x.get_raw_value() for n, x in held.items()}) if held else None

    def follow(self, registry: AdapterRegistry) -> None:
        """Every wrapper does."""
        applied: list[Layer] = []
        for wrapper in self._wrappers().values():
            wrapper._follow(registry)
            applied += [layer for layer, _ in wrapper._applied()]
        self.root._expected = frozenset(reaching.expected(applied, registry.optional))

    def refuse_others_changes(self) -> None:
        """Nothing, if what trains is what this model chose.

        Raises:
          ConfigError: another one, which has the same Variables, did.
        """
        for wrapper in self._wrappers().values():
            if why := wrapper._chosen_by_another():
                raise ConfigError(why)

    def release(self) -> Any:
        """The base model, its own modules back in place of their wrappers."""
        wrappers = self._wrappers().values()
        root = cast(nnx.Module, self.root)
        replace_held(root, {id(wrapper): wrapper.base_layer for wrapper in wrappers})
        give_back_loras(self.root.model)
        return self.root.model


def _put(
    leaves: dict[str, Any],
    key: str,
    value: Any,
    kind: type[nnx.Variable[Any]] = FrozenAdapterParam,
) -> None:
    """A leaf that is not trained: in the Variable that is there, for those who hold on to it."""
    if key in leaves:
        leaves[key].set_raw_value(value)
    else:
        leaves[key] = kind(value)


def _wrapper_of(module: nnx.Module) -> type[RandLoraLayer]:
    if bridge := bridge_of(module):
        return bridge.wrapper
    return RandLoraItems if has_items(module) else RandLoraLayer


# What a wrapper holds besides the module in whose place it stands.
_OURS = {
    "randlora_lambda",
    "randlora_gamma",
    "trained_leaves",
    "randlora_dropout",
    "randlora_own",
}
