"""The front end for ``flax.nnx`` modules."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flax import nnx

from randlora_jax.core.frozen import never_trained
from randlora_jax.front_ends.call_input import dtype_of
from randlora_jax.front_ends.nnx.base_loras import freeze_loras
from randlora_jax.front_ends.nnx.call import CallContext, ModelToken, opened
from randlora_jax.front_ends.nnx.layer import WrapperMeta
from randlora_jax.front_ends.nnx.leaves import OWN_PREFIXES
from randlora_jax.front_ends.nnx.modules import modules_of
from randlora_jax.front_ends.nnx.nested import depth_of
from randlora_jax.front_ends.nnx.parts import Part, attribute
from randlora_jax.front_ends.nnx.running import refuse_abstract, with_jax_arrays
from randlora_jax.front_ends.nnx.store import NnxStore
from randlora_jax.front_ends.nnx.variables import AdapterSlots, SharedBasis
from randlora_jax.front_ends.nnx.wrappable import make_wrappable, refuse_absent_kernels, refuse_part
from randlora_jax.front_ends.nnx_types import TYPES
from randlora_jax.front_ends.shown_signature import shows_call_of
from randlora_jax.models import known_models, stacking
from randlora_jax.models.adapter_arrays import Leaves
from randlora_jax.models.finding import find_layers
from randlora_jax.models.front_end import WrapRules, register_front_end, warn_of_another_model
from randlora_jax.models.layer import Layer, LayerRun
from randlora_jax.models.layer_types import LayerTypes, refuse_idle_types
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.quantised import refuse_rounding
from randlora_jax.models.reaching import refuse_unreached
from randlora_jax.models.registry import AdapterRegistry
from randlora_jax.models.slots import SlotTable
from randlora_jax.models.store import ArrayStore

_TRAINED = (
    "with an optimizer for nnx.Param it is being trained. For the adapter alone: wrt=AdapterParam "
    "and nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model). To train the "
    "base with it: "
    "nnx.DiffState(0, nnx.All(nnx.Param, nnx.Not(nnx.PathContains('randlora_bases')))). A trainer "
    "that looks for LoRAParam and finds none trains the base, too: an adapter that from_pretrained "
    "opens is frozen, unless is_trainable=True."
)


def _is_own(name: str) -> bool:
    """Whether the wrapper looks for an attribute in itself, and never in its model."""
    own = ("model", "_token", "_expected", "_noted")
    return name in own or name.startswith(OWN_PREFIXES)


class NotedSlots:
    """What a model with stacked adapters knows: changed in place, and compared by identity.

    A model in a state in which it was before is not traced again, but flax then gives it the static
    parts of the one that was. Of which adapters are in which slots that would be an old list.

    Copies of a model share it (``nnx.clone``), and each chooses for itself what is active: that is
    in its table of slots.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry  # with the choices of the copy that was asked last
        self._asked: Callable[[], Any] = lambda: None  # what its table has

    def of(self, table: SlotTable | None) -> AdapterRegistry:
        """As the copy that has this table chose."""
        if table and self._asked() is not table.chosen and stacking.is_readable(table):
            self.note(stacking.chosen_in(self.registry, table), table)
        return self.registry

    def note(self, registry: AdapterRegistry, table: SlotTable | None) -> None:
        """What is known from here on, of the copy that has this table."""
        self.registry = registry
        seen = table if table and stacking.is_readable(table) else None
        self._asked = weakref.ref(seen.chosen) if seen else lambda: None

    def __getstate__(self) -> AdapterRegistry:
        return self.registry

    def __setstate__(self, registry: AdapterRegistry) -> None:
        self.__init__(registry)  # type: ignore[misc]


@register_front_end(
    "a flax.nnx.Module", accepts=lambda model, rules: isinstance(model, nnx.Module | Part)
)
class NnxRandLora(RandLoraModel, nnx.Module, metaclass=WrapperMeta):
    """An nnx model with adapters: call it as the model itself.

    The modules that hold adapted kernels are replaced in place by `RandLoraLayer`. Methods and
    parts of the model are reached through the wrapper (``model.encoder(x)``), which opens the
    context with the shared bases; the model itself is ``model.model``.
    """

    def __init__(self, model: nnx.Module, rules: WrapRules) -> None:
        refuse_part(model)
        known = known_models.about(model)
        if known.differs:
            warn_of_another_model(model, known.differs)
        walked = list(nnx.iter_modules(model))
        make_wrappable(model, walked)
        refuse_idle_types(rules.layer_types, {type(module) for _, module in walked})
        refuse_absent_kernels(LayerTypes((rules.layer_types,)), walked)
        rules = rules.beside(known)
        types = LayerTypes((rules.layer_types, TYPES))
        self.model = model
        self.randlora_bases: dict[str, dict[str, SharedBasis]] = nnx.data({})
        self.randlora_slots: dict[str, AdapterSlots] = nnx.data({})
        self._token = ModelToken(type(model), depth_of(module for _, module in walked))
        self._expected: frozenset[str] = frozenset()
        modules = modules_of(walked, types, rules.layouts)
        arrays = [(*module.path, *leaf) for module in modules for leaf in module.arrays]
        for path, module in walked:
            refuse_rounding(path, type(module), arrays)
        found = find_layers(modules, rules.layouts, rules.names)
        self._noted: AdapterRegistry | NotedSlots = AdapterRegistry.of(
            found, known.info, rules.names, rules.options, rules.optional
        )
        freeze_loras(model)

    __repr__ = __str__ = RandLoraModel.__repr__  # flax's show every array

    @property
    def _store(self) -> NnxStore:
        return NnxStore(self)

    @property
    def _registry(self) -> AdapterRegistry:
        known = self._noted
        return known if isinstance(known, AdapterRegistry) else known.of(self._store.slots())

    @_registry.setter
    def _registry(self, registry: AdapterRegistry) -> None:
        known = self._noted
        if isinstance(known, NotedSlots) and known.registry.stacks is registry.stacks:
            known.note(registry, self._store.slots())
        else:
            self._noted = NotedSlots(registry) if registry.stacks else registry

    def _follow(self, registry: AdapterRegistry, store: ArrayStore | None = None) -> None:
        super()._follow(registry, store)
        if isinstance(self._noted, NotedSlots):
            self._noted.note(registry, self._store.slots())  # those that say so

    @property
    def _base_name(self) -> str:
        return type(self.model).__name__

    def _runs(self, layers: Sequence[Layer], base: Leaves) -> dict[str, LayerRun]:
        modules = self._store.modules()
        found = super()._runs(layers, base)
        stated = {layer.name: dtype_of(modules[layer.owner]) for layer in layers}
        told = {name: dtype for name, dtype in stated.items() if dtype is not None}
        return found | {name: found[name]._replace(dtype=dtype) for name, dtype in told.items()}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained numbers, all numbers), as every `RandLoraModel` counts them.

        Raises:
          ConfigError: another model with the same Variables has chosen what trains.
        """
        self._store.refuse_others_changes()
        return super().get_nb_trainable_parameters()

    @shows_call_of(lambda self: self.model)
    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Calls the model.

        Args:
          adapter_names: an adapter for each row of the batch, by name or as `rows` gives them.
        """
        with self._opened(adapter_names):
            out = self.model(*args, **kwargs)
        refuse_unreached(self._expected - self._token.reached)
        return out

    def __getattr__(self, name: str) -> Any:
        if _is_own(name) or "model" not in vars(self):  # the latter while it is made
            raise AttributeError(name)
        return attribute(self.model, name, self._opened)

    def __setattr__(self, name: str, value: Any) -> None:
        if _is_own(name) or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # in the model, which runs with it
            setattr(self.model, name, value)

    @contextmanager
    def _opened(self, adapter_names: Any = None) -> Iterator[None]:
        """Within, the layers of this model find its bases, and what rows take of its adapters."""
        pairs = self._store.pairs()
        for identity, pair in pairs.items():
            refuse_abstract(f"randlora_bases {identity}", pair.A)
        bases, rows = never_trained(pairs, _TRAINED), self._chosen(adapter_names)
        with opened(CallContext(self._token, bases, rows)):
            try:
                yield
            except (TypeError, AttributeError):  # what JAX makes of an abstract array
                with_jax_arrays(dict(nnx.to_flat_state(nnx.state(self.model))))
                raise
