"""Running the layers of a linen module with their adapters.

For a call the adapters' leaves are laid beside the kernels they adapt (`beside`). An interceptor
finds them there in whatever module runs, under whatever transformation. A layer that is a sum over
axes of its input runs alone, each pass its cheapest way (`core.applying`); any other module, by any
of its methods, runs with W + delta in place of its kernels. The bases do not vary along a scan;
they enter by closure, as tracers of the caller's ``jit``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.applying_rows import SPLIT, adapted_rows
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.contraction import Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.mesh import splits_rows
from randlora_jax.core.ways import Way, possible_ways, require_a_way
from randlora_jax.front_ends.call_input import Arguments, CallInput, input_of, running_layer
from randlora_jax.front_ends.linen.alone import ChangesState, alone, around
from randlora_jax.front_ends.linen.beside import (
    BESIDE,
    SHARES,
    Shares,
    joined,
    layers_in,
)
from randlora_jax.front_ends.linen.by_row import (
    has_trained_whole,
    refusal,
    run_trained_whole,
    trained_whole,
    trained_whole_at,
)
from randlora_jax.front_ends.linen.dropout import Drawing
from randlora_jax.front_ends.linen.interceptors import MetInside, Ours, entered_since, within
from randlora_jax.front_ends.linen.lifted import (
    HandsOutModules,
    is_lifted,
    maps_around,
    method_of,
    run_with,
    runs,
)
from randlora_jax.front_ends.linen.normed import MAPPED, refuse_normed
from randlora_jax.front_ends.linen.types import (
    changes_state,
    is_bridge,
    kinds_of,
    modules_inside,
    type_of,
)
from randlora_jax.front_ends.params import flat, unboxed, with_leaves
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.layer import Layer, LayerRun, LayerType
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.quantised import quantises, refuse_rounding, scale_of
from randlora_jax.models.registry import AdapterRegistry
from randlora_jax.models.slots import RowChoice, slots_apart


@dataclass(frozen=True)
class _Met:
    """A method of a module with adapted kernels, which is about to run.

    Args:
      method: the function, which takes its module first.
      name: of the method.
      arguments: of the call.
      own: the module's params, and what lies beside its kernels.
      layers: whose kernels they are, and where each is in `own`.
      known: what is known of the class that holds each kernel.
      kinds: the name of that class.
      inside: names of the layers that are parts of the module, an nnx one, and not itself.
    """

    module: nn.Module
    method: Callable[..., Any]
    name: str
    arguments: Arguments
    own: Mapping[str, Any]
    layers: Mapping[str, tuple[Layer, Path]]
    known: Mapping[str, LayerType | None]
    kinds: Mapping[str, str]
    inside: frozenset[str] = frozenset()

    @property
    def kernels_trained_whole(self) -> bool:
        """Whether rows have leaves of their own here, and these are no mere biases of a layer."""
        if not self.layers:
            return has_trained_whole(self.own, deep=True)
        whole = trained_whole_at(self.own)
        return any(path in whole for _, path in self.layers.values())

    @property
    def inner(self) -> list[Mapping[str, Any]]:
        """The params of modules inside."""
        return [x for key, x in self.own.items() if key != BESIDE and isinstance(x, Mapping)]

    def parted(self) -> tuple["_Met", "_Met"]:
        """With those layers of which a class is known, and this is none; with all others."""
        strange = {
            name: (layer, path)
            for name, (layer, path) in self.layers.items()
            if layer.type is not None and self.known[name] is None
        }
        others = {name: met for name, met in self.layers.items() if name not in strange}
        return replace(self, layers=strange), replace(self, layers=others)

    def input_alone(self, *, by_row: bool = False) -> CallInput | str:
        """The input of a layer that can run alone; or why this one cannot.

        Args:
          by_row: rows with adapters of their own, for whom a layer may compute anything.
        """
        ((name, _), *more) = self.layers.items()
        known = self.known[name]
        if self.name != "__call__":
            return f"it runs by its method {self.name!r}"
        if name in self.inside:
            return "it is a part of an nnx module, which alone is called"
        if more:
            return "its module has several adapted kernels"
        if not by_row and (known is None or known.call is None):
            return "the layer is not known to be a sum over axes of its input"
        if len(list(layers_in(self.own, deep=True))) > 1:
            return "layers inside it are adapted, too"
        if any(has_trained_whole(x, deep=True) for x in self.inner):
            return "leaves inside it are trained whole, too"
        if changes_state(self.module):
            return "it may change its collections in this call"
        taken = input_of(partial(self.method, self.module), *self.arguments)
        return taken or "it was called without an array of numbers"


@dataclass
class LinenRunner:
    """Joins the adapters in wherever a module is met that has leaves of theirs beside its kernels.

    Args:
      registry: of the model.
      types: of layers.
      pairs: the shared bases, by their identity as text.
      seen: takes down how each layer ran, by name.
      kinds: takes down the classes of modules that ran; None where nobody asks.
      choice: what the call takes of stacked adapters; None where it applies the active ones.
      drawing: draws what adapters drop.
    """

    registry: AdapterRegistry
    types: LayerTypes
    pairs: Mapping[str, BasisPair]
    seen: dict[str, LayerRun]
    kinds: set[type] | None = None
    choice: RowChoice | None = None
    drawing: Drawing = field(default_factory=Drawing)
    _maps: int = field(default=0, init=False)  # our own nn.map_variables that are running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, linen modules that are called run with their adapters."""
        with nn.intercept_methods(Ours(self._intercept)):
            yield

    @contextmanager
    def _choosing(self, choice: RowChoice) -> Iterator[None]:
        """Within, layers take `choice` of stacked adapters."""
        outer, self.choice = self.choice, choice
        try:
            yield
        finally:
            self.choice = outer

    @property
    def _by_row(self) -> RowChoice | None:
        """What each row takes of stacked adapters; None where all are alike."""
        return self.choice if self.choice and not self.choice.alike else None

    def _intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        self.drawing.meet(context.module)
        if self.kinds is not None:
            self.kinds |= kinds_of(context.module)
        met = self._met(context, (args, kwargs))
        if met is None:
            return call(*args, **kwargs)
        inner = entered_since()
        if not inner:
            return self._joined(met, call)

        def joined(*args: Any, **kwargs: Any) -> Any:
            return self._joined(replace(met, arguments=(args, kwargs)), context.orig_method)

        return within(inner, joined, context)(*args, **kwargs)

    def _joined(self, met: _Met, call: Callable[..., Any]) -> Any:
        """What a method returns with adapters; `call` is the method as it is."""
        args, kwargs = met.arguments
        if self._by_row and met.kernels_trained_whole:
            return run_trained_whole(
                met.module, met.name, met.arguments, self._by_row, self._choosing
            )
        if maps_around(met.module) > self._maps:
            raise ConfigError(
                f"{listed(met.layers)}: {MAPPED}, so called and merged would differ; leave it out "
                "of target_modules"
            )
        strange, told = met.parted()
        if is_bridge(met.module):
            self._refuse_strange(strange)
        seen = dict(self.seen)
        try:
            out = self._run(told) if told.layers else call(*args, **kwargs)
        except HandsOutModules:  # a method that gets a part, for others to call
            self.seen.clear()
            self.seen.update(seen)
            out = call(*args, **kwargs)
        # a module that shares its scope with a layer (nn.share_scope) leaves it to that
        self._refuse_strange(strange)
        return out

    def _refuse_strange(self, met: _Met) -> None:
        """Nothing, if the layers that are met have run elsewhere.

        Raises:
          ConfigError: one has not, and nothing is known of its class.
        """
        for name, (layer, path) in met.layers.items():
            if name not in self.seen:
                self._kernel(met, layer, unboxed(flat(met.own)[path]))

    def _run(self, met: _Met) -> Any:
        """What the method returns, with the adapters joined in."""
        taken = met.input_alone(by_row=self._by_row is not None)
        if isinstance(taken, CallInput):
            draws = met.module.scope.rng_counters
            before = dict(draws)
            try:
                return self._run_alone(met, taken)
            except (MetInside, ChangesState) as why:
                taken = str(why)
                draws.update(before)
        if self._by_row:
            raise refusal(met.module, taken)
        return self._run_in_kernels(met, taken)

    def _met(self, context: nn.module.InterceptorContext, arguments: Arguments) -> _Met | None:
        """What is about to run, if it is a method of a module with adapted kernels."""
        module = context.module
        if module.scope is None or not runs(context) or is_lifted(context):
            return None
        refuse_normed(module)
        own = module.variables.get("params", {})
        bridges = is_bridge(module)
        layers = {
            name: (self.registry.layers[name], path) for name, path in layers_in(own, deep=bridges)
        }
        if not layers and not (self._by_row and has_trained_whole(own, deep=bridges)):
            return None
        for outer in around(module):
            if quantises(type(outer)):
                refuse_rounding((), type(outer), flat(outer.variables["params"]))
        method = method_of(context)
        if bridges:
            parts = {slashed(path): part for path, part in modules_inside(module).items()}
            homes = {n: _home(path, parts) for n, (_, path) in layers.items()}
            holders = {n: parts.get(home) for n, home in homes.items()}
            known = {n: self.types.find(holder) for n, holder in holders.items()}
        else:
            homes = {}
            holders = dict.fromkeys(layers, module)
            known = dict.fromkeys(layers, type_of(self.types, module, method, arguments))
        kinds = {name: type(holder).__name__ for name, holder in holders.items()}
        inside = frozenset(name for name, home in homes.items() if home)
        return _Met(
            module, method, context.method_name, arguments, own, layers, known, kinds, inside
        )

    def _run_alone(self, met: _Met, taken: CallInput) -> jax.Array:
        """The output of a layer that is a sum over axes of its input."""
        ((name, (layer, path)),) = met.layers.items()
        module = met.module
        params = {key: value for key, value in met.own.items() if key != BESIDE}
        arrays, place = flat(params), scale_of(path)
        kernel, call = self._kernel(met, layer, unboxed(arrays[path]))
        scale = unboxed(arrays[place]) if place else None
        beside, size = met.own[BESIDE], taken.x.shape[0] if taken.x.ndim > 1 else 1
        chosen = self._by_row.of_batches(size, name) if self._by_row else {}
        own = trained_whole(met.own, chosen)
        if self._by_row and own and splits_rows(taken.x):
            raise refusal(module, SPLIT)
        function = alone(module, with_leaves(params, own), path, taken)
        running = running_layer(module, name, (kernel, call), scale, taken.x, function)
        self.seen[name] = LayerRun(call, running.dtype)
        if self._by_row:
            updates = [
                chosen[stack].along(taken.x).row_updates(*arrays, self.pairs[stack], layer.matrix)
                for stack, arrays in self._stacked(kernel, beside[SHARES][name])
            ]
            ids = set(map(id, own.values()))
            by_row = [id(x) in ids for x in running.read]
            token_axes = self.registry.options.token_axes
            return adapted_rows(running, taken.x, updates, by_row, token_axes)
        shares = self._contributions(module, layer, kernel, beside[SHARES][name])
        return adapted(running, taken.x, shares, self.registry.options)

    def _run_in_kernels(self, met: _Met, not_beside: str) -> Any:
        """What the method returns with W + delta in place of the adapted kernels.

        Raises:
          ConfigError: a kernel can take no update, or an adapter needs to see its layer's input,
            which it cannot beside the module.
        """

        def join(name: str, kernel: jax.Array, beside: Shares) -> jax.Array:
            layer, _ = met.layers[name]
            held, _ = self._kernel(met, layer, kernel)
            shares = self._contributions(met.module, layer, held, beside)
            drops = any(share.drop for share in shares)
            options = self.registry.options
            possible = possible_ways(held, None, kernel.dtype, options, drops=drops)
            beside_not = dict.fromkeys((Way.FORMED, Way.FACTORED), not_beside)
            require_a_way(name, replace(possible, against={**possible.against, **beside_not}))
            self.seen[name] = LayerRun(None, kernel.dtype)
            return held.taking([share.update for share in shares])

        def method(*args: Any, **kwargs: Any) -> Any:
            self._maps += 1
            try:
                return met.method(*args, **kwargs)
            finally:
                self._maps -= 1

        return run_with(
            met.module, method, met.arguments, lambda params: joined(params, met.layers, join)
        )

    def _kernel(
        self, met: _Met, layer: Layer, array: jax.Array
    ) -> tuple[Kernel, Contraction | None]:
        """The kernel of a layer as it is in this call, and what the layer computes."""
        return layer.running_kernel(array, met.known[layer.name], met.kinds[layer.name])

    def _contributions(
        self, module: nn.Module, layer: Layer, kernel: Kernel, beside: Shares
    ) -> list[Contribution]:
        """What adapters add to a layer."""
        found = []
        if self.choice:
            for name, (lam, gamma) in self._stacked(kernel, beside):
                pair = self.pairs[name]
                updates = self.choice.chosen[name].updates(lam, gamma, pair, layer.matrix)
                found += [Contribution(update) for update in updates]
            return found
        for name, arrays in beside.items():
            spec = self.registry.specs[name]
            lam, gamma = map(kernel.layout.stack_first, arrays)
            update = spec.update(lam, gamma, self.pairs, layer.matrix)
            found.append(Contribution(update, self.drawing.of(module, layer, spec.dropout)))
        return found

    def _stacked(
        self, kernel: Kernel, beside: Shares
    ) -> Iterator[tuple[str, tuple[jax.Array, jax.Array]]]:
        """Lambda and gamma of all adapters of each stack, (*stack axes, slots, ...).

        Raises:
          ConfigError: one of them would drop some of its input, which no row can.
        """
        stacks = {stack.name: stack for stack in self.registry.row_stacks}
        for name, arrays in beside.items():
            for member in stacks[name].members:
                if self.registry.specs[member].dropout > 0 and self.drawing.is_on:
                    raise ConfigError(
                        f"adapter {member!r} has dropout, which a dropout rng turns on, and "
                        "adapter_names are for inference, as in PEFT: call without that rng"
                    )
            lam, gamma = map(kernel.layout.stack_first, arrays)
            slots = stacks[name].capacity
            yield name, (slots_apart(lam, slots), slots_apart(gamma, slots))


def _home(path: Path, parts: Mapping[str, Any]) -> str:
    """The path of the innermost of `parts`, by their paths, that holds what is at `path`."""
    outer = (slashed(path[:i]) for i in range(len(path) - 1, -1, -1))
    return next((home for home in outer if home in parts), "")
