"""The wrapper that stands in the place of a module and runs it with its adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from randlora_jax.core.applying import Contribution, Run, RunningLayer, adapted, comparable
from randlora_jax.core.hoisting import Hoisted
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.front_ends.nnx.call import ModelToken, current
from randlora_jax.front_ends.nnx.variables import retyped
from randlora_jax.models.layer import Layer
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec


@dataclass(frozen=True)
class Settings:
    """All that a wrapper knows and that is no array: static under ``jit``.

    Args:
      layer: None where only whole leaves are trained.
      options: how layers apply their adapters.
      model: whose call it belongs to.
      specs: of the adapters that are active and have something here.
      merged: names of the adapters whose deltas are in the kernel.
    """

    layer: Layer | None
    options: ExecutionOptions
    model: ModelToken
    specs: tuple[AdapterSpec, ...] = ()
    merged: tuple[str, ...] = ()


class RandLoraLayer(nnx.Module):
    """Stands in the place of a module and runs it with the adapters joined in.

    Args:
      base_layer: the module it replaces; unknown attributes are looked up there.
    """

    def __init__(self, base_layer: nnx.Module, settings: Settings) -> None:
        self.base_layer = base_layer
        self.randlora_lambda: dict[str, nnx.Variable[jax.Array]] = nnx.data({})
        self.randlora_gamma: dict[str, nnx.Variable[jax.Array]] = nnx.data({})
        self.trained_leaves: dict[str, dict[str, nnx.Variable[jax.Array]]] = nnx.data({})
        self.randlora_dropout: dict[str, nnx.Dropout] = nnx.data({})
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        if name == "base_layer" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._effective(), name)

    def held(self) -> tuple[dict[str, Any], ...]:
        """Everything that is kept by adapter name."""
        return (
            self.randlora_lambda,
            self.randlora_gamma,
            self.trained_leaves,
            self.randlora_dropout,
        )

    def follow(self, registry: AdapterRegistry) -> None:
        """Applies and trains the adapters that the registry says, as far as they are here."""
        here = {name for held in self.held() for name in held}
        specs = tuple(registry.specs[name] for name in registry.active if name in here)
        self.settings = replace(self.settings, specs=specs, merged=registry.merged)
        training = set(registry.training)
        for leaves in (self.randlora_lambda, self.randlora_gamma):
            for name, leaf in leaves.items():
                leaves[name] = retyped(leaf, trained=name in training)
        for name, whole in self.trained_leaves.items():
            for key, leaf in whole.items():
                whole[key] = retyped(leaf, trained=name in training)

    def _effective(self) -> nnx.Module:
        """The base layer, with the leaves that the active adapters train whole in place."""
        specs, whole = self.settings.specs, self.trained_leaves
        leaves = {k: leaf for spec in specs for k, leaf in whole.get(spec.name, {}).items()}
        if not leaves:
            return self.base_layer
        graph, state = nnx.split(self.base_layer)
        for name, leaf in leaves.items():
            state[name] = state[name].replace(leaf[...].astype(state[name][...].dtype))
        return cast(nnx.Module, nnx.merge(graph, state))

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns, with the active adapters joined in."""
        base = self._effective()
        layer, merged = self.settings.layer, self.settings.merged
        specs = [s for s in self.settings.specs if s.name in self.randlora_lambda]
        specs = [s for s in specs if s.name not in merged]
        if layer is None or not specs:
            return base(x, *args, **kwargs)
        run, kernel, read = _as_function(base, layer.leaf[0], args, kwargs)
        layout, call = layer.running(kernel.shape, layer.type, type(self.base_layer).__name__)
        running = RunningLayer(
            layer.name,
            run,
            read,
            Kernel.traced(kernel, layout, layer.sharding),
            call,
            multiplies_in(self.base_layer, jnp.result_type(x, kernel)),
        )
        return adapted(running, x, self._contributions(specs, layer), self.settings.options)

    def _contributions(self, specs: list[AdapterSpec], layer: Layer) -> list[Contribution]:
        """What the adapters of `specs` add in this call."""
        pairs = current(self.settings.model, layer.name).pairs
        found = []
        for spec in specs:
            lam, gamma = (held[spec.name][...] for held in self.held()[:2])
            drop = self.randlora_dropout.get(spec.name)
            off = drop is None or drop.deterministic
            update = spec.update(lam, gamma, pairs, layer.matrix)
            found.append(Contribution(update, None if off else drop))
        return found


@dataclass(frozen=True)
class _RunModule:
    """Runs a module of a given structure, whose arrays come apart.

    Args:
      graph: its structure.
      leaf: the kernel's name in it.
      values: of its state, kernel first, and of the call's arguments behind x.
    """

    graph: nnx.GraphDef[nnx.Module]
    leaf: str
    values: Hoisted

    def __call__(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the module returns."""
        variable, rest, args, kwargs = self.values.with_arrays([kernel, *read])
        state = nnx.State({**rest, self.leaf: variable})
        return cast(jax.Array, nnx.merge(self.graph, state)(x, *args, **kwargs))


def _as_function(
    module: nnx.Module, leaf: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Run, jax.Array, Sequence[jax.Array]]:
    """A module as a function of its kernel and of x; its kernel, and all else that it reads."""
    graph, state = nnx.split(module)
    rest = {name: value for name, value in state.items() if name != leaf}
    values, (kernel, *read) = Hoisted.of((state[leaf], rest, args, kwargs))
    return comparable(_RunModule(graph, leaf, values)), kernel, read


def multiplies_in(module: nnx.Module, otherwise: DTypeLike) -> DTypeLike:
    """The dtype a layer promotes its input and kernel to; `otherwise`, if it states none."""
    stated: DTypeLike | None = getattr(module, "dtype", None)
    return otherwise if stated is None else stated
