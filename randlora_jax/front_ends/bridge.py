"""Linen modules inside an nnx model (``nnx.bridge.ToNNX``): their layers run as linen's do."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import flax.linen as nn
from flax import nnx

from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.front_ends.collections import GAMMA, LAMBDA, TRAINED
from randlora_jax.front_ends.linen.beside import TokenOfCalls, cleared, laid_beside
from randlora_jax.front_ends.linen.modules import taken_for
from randlora_jax.front_ends.linen.running import LinenRunner
from randlora_jax.front_ends.linen.types import TYPES, unquantised
from randlora_jax.front_ends.nnx.bridges import Bridge, register_bridge
from randlora_jax.front_ends.nnx.call import CallContext, open_for, reached
from randlora_jax.front_ends.nnx.held import arrays_of
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.finding import FoundLayers, FoundModule, StatedLayouts
from randlora_jax.models.layer import Layer
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Names, Path, slashed
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, BaseModelInfo

_MODULE = "to_nnx__module"  # where ToNNX keeps its linen module


class RandLoraToNNX(RandLoraLayer):
    """Stands in the place of a ToNNX and runs its linen module with the adapters joined in."""

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = open_for(self.settings.model, self.by_row())
        if self.kept_in_stacks or (context and context.rows and context.rows.rows is not None):
            names = listed([layer.name for layer, _ in self.by_row()], 3)
            raise ConfigError(
                f"{names}: layers of a linen module inside an nnx model cannot run with adapters "
                "by row, nor with adapters in stacks"
            )
        base = self._effective(context)
        call = getattr(base, method)
        if not self.applied():
            return call(*args, **kwargs)
        context = reached(self.settings.model, self.applied())
        with self._joining(base, context):
            return call(*args, **kwargs)

    @contextmanager
    def _joining(self, base: nnx.Module, context: CallContext) -> Iterator[None]:
        """Within, the linen module that `base` applies is one that joins the adapters in."""
        held = vars(base)  # past nnx's checks: it is put back before anything sees it
        module = held[_MODULE]
        layers = tuple(layer for layer, _ in self.applied())
        registry, calls = _by_itself(layers, self.settings.specs, self.settings.options)
        held[_MODULE] = _Joined(module, registry, calls, self._trees(), context)
        try:
            yield
        finally:
            held[_MODULE] = module

    def _trees(self) -> dict[str, dict[str, Any]]:
        """Lambda and gamma as linen's collections hold them."""
        trees: dict[str, dict[str, Any]] = {}
        for layer, specs in self.applied():
            for spec in specs:
                node = trees.setdefault(spec.name, {})
                for part in _inside(layer).path:
                    node = node.setdefault(part, {})
                for leaf, held in zip((LAMBDA, GAMMA), self.held()[:2], strict=False):
                    value = held[spec.name][slashed(layer.leaf)][...]
                    node[leaf] = layer.layout.stack_first(value)
        return trees


class _Joined:
    """A linen module that is applied with adapters joined in."""

    def __init__(
        self,
        module: nn.Module,
        registry: AdapterRegistry,
        calls: TokenOfCalls,
        trees: dict[str, dict[str, Any]],
        context: CallContext,
    ) -> None:
        self.module, self.registry, self.calls = module, registry, calls
        self.trees, self.context = trees, context

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        token = self.calls.of(self.registry, self.context.pairs)
        whole = laid_beside(
            {**variables, TRAINED: self.trees}, self.registry.layers, token, applied=True
        )
        runner = LinenRunner(self.registry, LayerTypes((TYPES,)), self.context.pairs, {})
        with runner.running():
            result = self.module.apply(whole, *args, **kwargs)
        return cleared(result, kwargs.get("mutable", False))


@functools.lru_cache
def _by_itself(
    layers: tuple[Layer, ...], specs: tuple[AdapterSpec, ...], options: ExecutionOptions
) -> tuple[AdapterRegistry, TokenOfCalls]:
    """What a linen module knows by itself; equal modules share it, and what they compiled."""
    inside = map(_inside, layers)
    found = FoundLayers({layer.name: layer for layer in inside}, ())
    registry = AdapterRegistry.of(found, BaseModelInfo(), Names({}), options)
    by_name = {spec.name: spec for spec in specs}
    return replace(registry, specs=by_name, active=tuple(by_name)), TokenOfCalls()


def _inside(layer: Layer) -> Layer:
    """A layer as the linen module by itself has it."""
    path, leaf = layer.path[len(layer.owner) :], layer.leaf
    owner = path if len(path) < len(leaf) else path[:-1]  # a layer's path may be its array's
    return replace(layer, path=path, owner=owner, leaf=leaf[len(owner) :])


def _modules(path: Path, module: nnx.Module, stated: StatedLayouts) -> list[FoundModule]:
    """What is in a ToNNX: nobody tells the types of linen modules before they run."""
    owned: dict[Path, dict[Path, Any]] = {}

    def walk(inner: Path, held: Mapping[str, Any]) -> None:
        for name, value in held.items():
            if isinstance(value, nnx.Variable):
                if isinstance(value, nnx.Param):
                    arrays = {(name, *leaf): x for leaf, x in arrays_of(value).items()}
                    owned.setdefault(inner, {}).update(arrays)
            elif isinstance(value, Mapping) and not name.startswith("_pytree__"):
                walk((*inner, name), value)

    walk((), {n: x for n, x in vars(module).items() if not n.startswith("to_nnx__")})
    found = []
    for inner, arrays in owned.items():
        whole = (*path, *inner)
        known = taken_for(whole, arrays, stated)
        found.append(FoundModule(whole, arrays, type=known, inside=path))
    return found


def _is_to_nnx(module: Any) -> bool:
    """Whether a module is an ``nnx.bridge.ToNNX``, or of a copy of that class, as MaxText has."""
    return isinstance(module, nnx.Module) and _MODULE in vars(module)


def _unquantise(module: nnx.Module) -> None:
    held = vars(module)
    held[_MODULE] = unquantised(held[_MODULE])


register_bridge(Bridge(_is_to_nnx, _modules, RandLoraToNNX, _unquantise))
