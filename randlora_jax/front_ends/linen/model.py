"""The front end for ``flax.linen`` modules.

Linen keeps state in collections, so trained and frozen numbers get one each (`collections`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze
from flax.core.scope import is_filter_empty
from flax.errors import ScopeParamShapeError

from randlora_jax.front_ends.call_token import TokenOfCalls
from randlora_jax.front_ends.collections import (
    CollectionStore,
    adapter_trees,
    state_of,
)
from randlora_jax.front_ends.functional import FunctionalRandLora
from randlora_jax.front_ends.linen.beside import (
    Rows,
    cleared,
    laid_beside,
)
from randlora_jax.front_ends.linen.modules import modules_of
from randlora_jax.front_ends.linen.running import LinenRunner
from randlora_jax.front_ends.linen.tracing import Trace
from randlora_jax.front_ends.linen.types import TYPES, unquantised
from randlora_jax.front_ends.shown_signature import shows_call_of
from randlora_jax.interop.errors import ConfigError, shown
from randlora_jax.models import known_models
from randlora_jax.models.adapter_arrays import Leaves
from randlora_jax.models.finding import find_layers
from randlora_jax.models.front_end import WrapRules, register_front_end
from randlora_jax.models.layer import Layer, LayerRun
from randlora_jax.models.layer_types import LayerTypes, Table, refuse_idle_types
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.quantised import refuse_rounding
from randlora_jax.models.reaching import expected, refuse_unreached
from randlora_jax.models.registry import AdapterRegistry, BaseModelInfo
from randlora_jax.models.slots import RowChoice


def types_with(rules: WrapRules) -> LayerTypes:
    """A user's types of layers, and those that are known."""
    return LayerTypes((rules.layer_types, TYPES))


class InterceptedRandLora(FunctionalRandLora):
    """A linen module whose layers are met while it runs."""

    module: nn.Module
    _types: LayerTypes
    _seen: dict[str, LayerRun]
    _token: TokenOfCalls
    _untold: Table  # a user's types of layers, until a run has told whether the model has them

    def _begin(
        self,
        module: nn.Module,
        store: CollectionStore,
        rules: WrapRules,
        trace: Trace | None,
        info: BaseModelInfo,
        untold: Table,
    ) -> None:
        self.module = module
        self._collections = store
        self._types = types_with(rules)
        self._seen = {}
        self._token = TokenOfCalls()
        self._untold = untold
        leaves = store.base_leaves()
        refuse_rounding((), type(module), leaves)
        modules = modules_of(store.base, leaves, trace, rules.layouts)
        found = find_layers(modules, rules.layouts, rules.names)
        self._registry = AdapterRegistry.of(found, info, rules.names, rules.options, rules.optional)

    def apply(
        self, variables: Mapping[str, Any], *args: Any, adapter_names: Any = None, **kwargs: Any
    ) -> Any:
        """Linen's ``Module.apply`` with the adapters in `variables` joined in.

        Args:
          adapter_names: an adapter for each row of the batch, by name or as `rows` gives them.

        Raises:
          ConfigError: `variables` lack something, or hold what is not this model's; the module's
            own call did not reach an adapted layer, or met no module of a type in `layer_types`.
        """
        variables = self._checked(variables, adapter_names)
        choice = self._rows_in(variables, adapter_names)
        kinds: set[type] | None = set() if self._untold else None
        with self._adapting(variables, choice, kinds) as whole:
            result = self.module.apply(whole, *args, **kwargs)
        if kwargs.get("method") is None:
            refuse_idle_types(self._untold, kinds or ())
            self._untold = {}
            self._refuse_unreached(variables)
        return cleared(result, kwargs.get("mutable", False), variables)

    def _runs(self, layers: Sequence[Layer], base: Leaves) -> dict[str, LayerRun]:
        return {**super()._runs(layers, base), **self._seen}

    @contextmanager
    def _adapting(
        self,
        variables: Mapping[str, Any],
        choice: RowChoice | None = None,
        kinds: set[type] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Within, layers run with the adapters in `variables`; gives what the module takes.

        Args:
          choice: what the call takes of stacks; None where it applies the active adapters.
          kinds: takes down the classes of modules that run.
        """
        registry, pairs = self._registry, self._pairs_of(variables)
        token = self._token.of(pairs, choice, registry)
        rows = Rows(registry.row_stacks, choice) if choice else None
        applied = bool(registry.applied or rows)
        whole = laid_beside(variables, registry.layers, token, applied=applied, rows=rows)
        runner = LinenRunner(registry, self._types, pairs, self._seen, kinds, choice)
        try:
            with runner.running():
                yield whole
        except ScopeParamShapeError as error:
            for layer in registry.layers.values():
                *outer, last = layer.owner or ("",)
                if f'"{last}" in "/{slashed(outer)}"' in str(error):
                    raise ConfigError(
                        f"layer {layer.name!r} is one of several arrays that are one param of a "
                        "module, which only a run tells: pass sample_inputs=(...), what the model "
                        "is called with"
                    ) from error
            raise

    def _refuse_unreached(self, variables: Mapping[str, Any]) -> None:
        """Nothing, if some call has reached every layer that the adapters in `variables` adapt."""
        registry = self._registry
        trees = adapter_trees(variables) if registry.applied or registry.stacks else {}
        names = {name for tree in trees.values() for name in state_of(tree).layers}
        awaited = [registry.layers[name] for name in names - self._seen.keys()]
        refuse_unreached(expected(awaited, registry.optional))


def _refuse_run(bound: nn.Module) -> None:
    """Nothing, if a module is bound to its variables alone.

    Raises:
      ConfigError: it is bound to what belongs to a run, too, which a call here is given anew.
    """
    rngs, mutable = bound.scope.rngs, bound.scope.mutable
    if rngs or not is_filter_empty(mutable):
        raise ConfigError(
            f"the linen module {type(bound).__name__} is bound with rngs of {shown(sorted(rngs))} "
            f"and mutable={shown(mutable)}: pass module.bind(variables) without them, and give "
            "them to each call, model.apply(model.variables, ..., rngs=..., mutable=...)"
        )


class LinenStore(CollectionStore):
    """The collections of a linen module, which are bound to it again in the end."""

    def __init__(self, module: nn.Module, base: dict[str, Any]) -> None:
        super().__init__(base)
        self.module = module

    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """The module whose class quantises becomes one of the class that was made of."""
        super().put_floats(leaves)
        self.module = unquantised(self.module)

    def release(self) -> nn.Module:
        """The bound module."""
        return self.module.bind(self.base)


@register_front_end(
    "a flax.linen module bound to its variables (module.bind(variables))",
    accepts=lambda model, rules: isinstance(model, nn.Module),
)
class LinenRandLora(InterceptedRandLora):
    """A linen module with adapters: ``model.apply(variables, ...)`` as linen's own.

    ``variables = model.variables`` holds the collections; train ``variables["randlora"]``.
    Adapter dropout is on exactly when a ``dropout`` rng is passed.
    """

    takes_sample_inputs = True
    _hint = "Pass sample_inputs=(...), what the model is called with: then its modules tell all. "

    def __init__(self, model: nn.Module, rules: WrapRules) -> None:
        if model.scope is None:
            raise ConfigError(
                f"the linen module {type(model).__name__} carries no variables: pass "
                "module.bind(variables)"
            )
        _refuse_run(model)
        module, variables = model.unbind()
        store = LinenStore(module, unfreeze(variables))
        known = known_models.about(module)
        whole = rules.beside(known)
        trace, untold = None, rules.layer_types
        if rules.sample_inputs is not None:
            trace = Trace(types_with(whole), LayerTypes((rules.layer_types,)))
            trace.called(module, store.base, rules.sample_inputs)
            if rules.sample_inputs.method is None:
                refuse_idle_types(untold, trace.kinds)
                untold = {}
        self._begin(module, store, whole, trace, known.info, untold)

    @property
    def _base_name(self) -> str:
        return type(self.module).__name__

    @shows_call_of(lambda self: self.module)
    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """As the bound module: `apply` with the model's own variables."""
        variables = self._variables_for(adapter_names)
        return self.apply(variables, *args, adapter_names=adapter_names, **kwargs)
