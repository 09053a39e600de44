"""Running the layers of a linen module with their adapters.

For a call the adapters' leaves are laid *beside the kernels they adapt* inside ``params``: there,
and only there, ``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and carry them as they do kernels.
An interceptor then finds a layer's own leaves in its own scope, under whatever transformation it
runs. The bases do not vary along a scan; they enter by closure, as tracers of the caller's ``jit``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.applying import (
    Contribution,
    RunningLayer,
    adapted,
    comparable,
    dropout,
)
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.hoisting import Hoisted
from randlora_jax.core.kernel import Kernel
from randlora_jax.front_ends.collections import GAMMA, LAMBDA, adapter_trees, base_collections
from randlora_jax.models.layer import LayerRun
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import dotted
from randlora_jax.models.registry import AdapterRegistry


def beside_kernels(variables: Mapping[str, Any], *, applied: bool) -> dict[str, Any]:
    """The collections of the base model, with adapter leaves beside the kernels they adapt.

    Args:
      applied: False leaves the adapters out.
    """
    params = flatten_dict(unfreeze(variables["params"]))
    trees = adapter_trees(variables) if applied else {}
    for name, tree in trees.items():
        for path, leaf in flatten_dict(unfreeze(tree)).items():
            if path[-1] in (LAMBDA, GAMMA):
                params[(*path, name)] = leaf
            else:
                params[path] = leaf.astype(params[path].dtype)
    return {**base_collections(variables), "params": unflatten_dict(params)}


@dataclass(frozen=True)
class LinenRunner:
    """Joins the adapters in wherever a layer is met that has leaves of theirs beside its kernel.

    Args:
      registry: of the model.
      types: of layers.
      pairs: the shared bases, by their identity as text.
      seen: takes down how each layer ran, by name.
    """

    registry: AdapterRegistry
    types: LayerTypes
    pairs: Mapping[str, BasisPair]
    seen: dict[str, LayerRun]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, linen modules that are called run with their adapters."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        own = module.variables.get("params", {})
        if LAMBDA not in own:
            return call(*args, **kwargs)
        return self._adapted(module, own, *args, **kwargs)

    def _adapted(
        self, module: nn.Module, own: Mapping[str, Any], x: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """The output of a layer for `x`; `own` are its params and the adapters' leaves."""
        layer = self.registry.layers[dotted(module.path)]
        kernel = own[layer.leaf[0]]
        layout, call = layer.running(
            kernel.shape, self.types.find(module), type(module).__name__
        )
        # without its name, so that layers that are alike but for it are equal
        alone = module.clone(parent=None, name=None)
        rest = {k: v for k, v in own.items() if k not in (layer.leaf[0], LAMBDA, GAMMA)}
        values, read = Hoisted.of((rest, args, kwargs))
        run = comparable(_RunLinen(alone, layer.leaf[0], values))

        stated = getattr(module, "dtype", None)
        dtype = jnp.result_type(x, kernel) if stated is None else stated
        self.seen[layer.name] = LayerRun(call, dtype)
        traced = Kernel.traced(kernel, layout, layer.sharding)
        running = RunningLayer(layer.name, run, read, traced, call, dtype)
        shares = [self._contribution(module, own, name, layer.matrix) for name in own[LAMBDA]]
        return adapted(running, x, shares, self.registry.options)

    def _contribution(
        self, module: nn.Module, own: Mapping[str, Any], name: str, matrix: tuple[int, int]
    ) -> Contribution:
        """What one adapter adds. Its dropout is on exactly where there is a rng to draw with."""
        spec = self.registry.specs[name]
        update = spec.update(own[LAMBDA][name], own[GAMMA][name], self.pairs, matrix)
        drops = spec.dropout > 0 and module.has_rng("dropout")
        drop = dropout(spec.dropout, module.make_rng("dropout")) if drops else None
        return Contribution(update, drop)


@dataclass(frozen=True)
class _RunLinen:
    """Runs a linen module whose arrays come apart.

    Args:
      module: unbound.
      leaf: the kernel's name in its params.
      values: of its other params, and of the call's arguments behind x.
    """

    module: nn.Module
    leaf: str
    values: Hoisted

    def __call__(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the module returns."""
        rest, args, kwargs = self.values.with_arrays([*read])
        params = {**rest, self.leaf: kernel}
        return cast(jax.Array, self.module.apply({"params": params}, x, *args, **kwargs))
