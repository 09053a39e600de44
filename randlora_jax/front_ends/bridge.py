"""Linen modules inside an nnx model (``nnx.bridge.ToNNX``): their layers run as linen's do."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from randlora_jax.core.applying_rows import BY_VMAP
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.front_ends.call_token import TokenOfCalls
from randlora_jax.front_ends.collections import GAMMA, LAMBDA, TRAINED
from randlora_jax.front_ends.linen.beside import (
    Rows,
    cleared,
    laid_beside,
)
from randlora_jax.front_ends.linen.dropout import Drawing
from randlora_jax.front_ends.linen.modules import taken_for
from randlora_jax.front_ends.linen.running import LinenRunner
from randlora_jax.front_ends.linen.types import TYPES, unquantised
from randlora_jax.front_ends.nnx.bridges import Bridge, register_bridge
from randlora_jax.front_ends.nnx.call import CallContext, reached
from randlora_jax.front_ends.nnx.held import arrays_of
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.finding import FoundLayers, FoundModule, StatedLayouts
from randlora_jax.models.layer import Layer
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Names, Path, slashed
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, BaseModelInfo
from randlora_jax.models.slots import Stack

_MODULE = "to_nnx__module"  # where ToNNX keeps its linen module
_STREAM = "randlora"  # an adapter's own rng, in a linen module that is called without one


class RandLoraToNNX(RandLoraLayer):
    """Stands in the place of a ToNNX and runs its linen module with the adapters joined in."""

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_row = self._call_by_row()
        if by_row and (whole := self._whole_by_row()):
            raise ConfigError(
                f"{listed(sorted(whole))}: adapters trained leaves of a linen module "
                f"inside an nnx model whole, which cannot follow the rows there. {BY_VMAP}"
            )
        applied = self._by_row() if by_row else self._applied()
        with self._whole() as base:
            call = getattr(base, method)
            if not applied:
                return call(*args, **kwargs)
            with self._joining(base, reached(self.randlora_settings.model, applied)):
                return call(*args, **kwargs)

    @contextmanager
    def _joining(self, base: nnx.Module, context: CallContext) -> Iterator[None]:
        """Within, the linen module that `base` applies is one that joins the adapters in."""
        held = vars(base)  # past nnx's checks: it is put back before anything sees it
        module = held[_MODULE]
        settings, by_row = self.randlora_settings, self._by_row()
        if context.rows:
            layers = tuple(layer for layer, _ in by_row)
            stacks = tuple(replace(stack, members=()) for stack in settings.stacks)
            registry, calls = _by_itself(layers, (), stacks, settings.options)
            trees, drops = self._trees_of_stacks(), {}
        else:
            layers, trees = tuple(layer for layer, _ in self._applied()), self._trees()
            drops = {name: drop for name in trees if (drop := self._drop(name))}
            specs = tuple(s if s.name in drops else replace(s, dropout=0.0) for s in settings.specs)
            registry, calls = _by_itself(layers, specs, (), settings.options)
        held[_MODULE] = _Joined(module, registry, calls, trees, context, [*drops.values()])
        try:
            yield
        finally:
            held[_MODULE] = module

    def _trees(self) -> dict[str, dict[str, Any]]:
        """Lambda and gamma as linen's collections hold them."""
        trees: dict[str, dict[str, Any]] = {}
        for layer, specs in self._applied():
            for spec in specs:
                both = [held[spec.name][slashed(layer.leaf)][...] for held in self._held()[:2]]
                lam, gamma = map(layer.layout.stack_first, both)
                _put(trees.setdefault(spec.name, {}), layer, lam, gamma)
        return trees

    def _trees_of_stacks(self) -> dict[str, dict[str, Any]]:
        """The same of stacks, by their names."""
        trees: dict[str, dict[str, Any]] = {}
        for layer, stacks in self._by_row():
            for stack in stacks:
                both = self._stacked(stack, layer, layer.layout)
                _put(trees.setdefault(stack.name, {}), layer, *both)
        return trees


def _put(tree: dict[str, Any], layer: Layer, lam: jax.Array, gamma: jax.Array) -> None:
    """Adds a layer's lambda and gamma to the tree of what holds them."""
    for part in _inside(layer).path:
        tree = tree.setdefault(part, {})
    tree[LAMBDA], tree[GAMMA] = lam, gamma


class _Joined:
    """A linen module that is applied with adapters joined in."""

    def __init__(
        self,
        module: nn.Module,
        registry: AdapterRegistry,
        calls: TokenOfCalls,
        trees: dict[str, dict[str, Any]],
        context: CallContext,
        drops: Sequence[nnx.Dropout],
    ) -> None:
        self.module, self.registry, self.calls = module, registry, calls
        self.trees, self.context, self.drops = trees, context, drops

    def apply(
        self, variables: Mapping[str, Any], *args: Any, rngs: Mapping[str, Any], **kwargs: Any
    ) -> Any:
        """As the module's own."""
        registry, pairs, choice = self.registry, self.context.pairs, self.context.rows
        token = self.calls.of(pairs, choice, registry)
        rows = Rows(registry.stacks, choice) if choice else None
        held = {**variables, TRAINED: self.trees}
        whole = laid_beside(held, registry.layers, token, applied=True, rows=rows)
        drawing = Drawing() if "dropout" in rngs else Drawing(_STREAM)
        if self.drops and drawing.stream == _STREAM:
            rngs = {**rngs, _STREAM: self.drops[0].rngs()}
        types = LayerTypes((TYPES,))
        runner = LinenRunner(registry, types, pairs, {}, choice=choice, drawing=drawing)
        with runner.running():
            result = self.module.apply(whole, *args, rngs=rngs, **kwargs)
        return cleared(result, kwargs.get("mutable", False), held)


@functools.lru_cache
def _by_itself(
    layers: tuple[Layer, ...],
    specs: tuple[AdapterSpec, ...],
    stacks: tuple[Stack, ...],
    options: ExecutionOptions,
) -> tuple[AdapterRegistry, TokenOfCalls]:
    """What a linen module knows by itself; equal modules share it, and what they compiled."""
    inside = map(_inside, layers)
    found = FoundLayers({layer.name: layer for layer in inside}, ())
    registry = AdapterRegistry.of(found, BaseModelInfo(), Names({}), options)
    by_name = {spec.name: spec for spec in specs}
    held = replace(registry, specs=by_name, active=tuple(by_name), stacks=stacks)
    return held, TokenOfCalls()


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
