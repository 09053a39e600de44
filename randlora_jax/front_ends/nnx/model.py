"""The front end for ``flax.nnx`` modules."""

import functools
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from flax import nnx

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends.nnx.call import CallContext, ModelToken, opened
from randlora_jax.front_ends.nnx.layer import multiplies_in
from randlora_jax.front_ends.nnx.store import NnxStore
from randlora_jax.front_ends.nnx.variables import SharedBasis
from randlora_jax.models import known_models
from randlora_jax.models.adapter_arrays import Leaves
from randlora_jax.models.finding import FoundModule, find_layers
from randlora_jax.models.front_end import WrapRules, register_front_end
from randlora_jax.models.layer import Layer, LayerRun, LayerType
from randlora_jax.models.layer_types import LayerTypes, Table, of_axes, of_einsum
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterRegistry


def _linear_general(module: nnx.LinearGeneral) -> LayerType:
    sides = len(module.in_features), len(module.out_features)
    return of_axes(*sides, module.axis, len(module.batch_axis))


def _einsum(module: nnx.Einsum) -> LayerType:
    return of_einsum(module.einsum_str)


TYPES: Table = {
    nnx.Linear: LayerType(KernelLayout("io")),
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
}


@register_front_end("a flax.nnx.Module", accepts=lambda model, rules: isinstance(model, nnx.Module))
class NnxRandLora(RandLoraModel, nnx.Module):
    """An nnx model with adapters: call it as the model itself.

    Adapted layers are replaced in place by `RandLoraLayer`. Other methods and attributes of the
    model are reached through the wrapper, which opens the context with the shared bases.
    """

    def __init__(self, model: nnx.Module, rules: WrapRules) -> None:
        known = known_models.about(model)
        rules = rules.beside(known)
        types = LayerTypes((rules.layer_types, TYPES))
        self.model = model
        self.bases: dict[str, dict[str, SharedBasis]] = nnx.data({})
        self._token = ModelToken()
        modules = [
            FoundModule(path, _arrays_of(module), type(module).__name__, types.find(module))
            for path, module in nnx.iter_modules(model)
        ]
        found = find_layers(modules, rules.layouts, rules.names)
        self._registry = AdapterRegistry.of(found, rules.names, known.info, rules.options)

    __repr__ = __str__ = RandLoraModel.__repr__  # flax's show every array

    @property
    def _store(self) -> NnxStore:
        return NnxStore(self)

    @property
    def _base_name(self) -> str:
        return type(self.model).__name__

    def _runs(self, layers: Sequence[Layer], base: Leaves) -> dict[str, LayerRun]:
        modules = self._store.modules()
        found = super()._runs(layers, base)
        return {
            layer.name: found[layer.name]._replace(
                dtype=multiplies_in(modules[layer.path], found[layer.name].dtype)
            )
            for layer in layers
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        with self._opened():
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.model, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self._opened():
                return found(*args, **kwargs)

        return method

    def _opened(self) -> AbstractContextManager[None]:
        """Within, the layers of this model find its bases."""
        return opened(self._token, CallContext(self._store.pairs()))


def _arrays_of(module: nnx.Module) -> dict[Path, Any]:
    """What a module holds itself, by name."""
    held = vars(module).items()
    return {(name,): x.get_raw_value() for name, x in held if isinstance(x, nnx.Variable)}
