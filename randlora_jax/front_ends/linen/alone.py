"""A linen layer as a function of its kernel and its input, and of all else that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
from flax.core.scope import LazyRng

from randlora_jax.core.hoisting import Hoisted
from randlora_jax.front_ends.boxes import unboxed
from randlora_jax.front_ends.call_input import CallInput, with_input


@dataclass(frozen=True)
class RunAlone:
    """Runs a linen module whose arrays come apart.

    Args:
      module: unbound.
      leaf: the kernel's name in its params.
      box: what the kernel lies in, without arrays; the kernel is the one at `at`.
      place: where its input stands among the arguments.
      values: of the arrays beside the kernel in its box, such as scales; the module's other
        collections and params, its rngs, and the call's other arguments.
    """

    module: nn.Module
    leaf: str
    box: Hoisted
    at: int
    place: int | str
    values: Hoisted

    def __call__(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the module returns."""
        boxed, collections, rngs, args, kwargs = self.values.with_arrays([*read])
        held = self.box.with_arrays([*boxed[: self.at], kernel, *boxed[self.at :]])
        params = {**collections["params"], self.leaf: held}
        args, kwargs = with_input((args, kwargs), self.place, x)
        variables = {**collections, "params": params}
        return cast(jax.Array, self.module.apply(variables, *args, rngs=rngs, **kwargs))


def alone(
    module: nn.Module, own: Mapping[str, Any], leaf: str, taken: CallInput
) -> tuple[RunAlone, list[jax.Array]]:
    """A bound layer by itself, and every array that it reads besides its kernel and its input.

    Args:
      own: its params and nothing beside them.
    """
    box, boxed = Hoisted.of(own[leaf])
    at = next(i for i, array in enumerate(boxed) if array is unboxed(own[leaf]))
    del boxed[at]
    rest = {**module.variables, "params": {k: v for k, v in own.items() if k != leaf}}
    values, read = Hoisted.of((boxed, rest, _rngs_of(module), *taken.rest))
    # without its name, so that layers that are alike but for it are equal
    unnamed = module.clone(parent=None, name=None)
    return RunAlone(unnamed, leaf, box, at, taken.place, values), read


def _rngs_of(module: nn.Module) -> dict[str, LazyRng]:
    """What a module draws from in this call: the first time, the very numbers of a plain call."""
    scope = module.scope
    found = {}
    for name, rng in scope.rngs.items():
        calls = scope.rng_counters[name]
        found[name] = LazyRng.create(rng, *([calls] if calls else []))
        scope.rng_counters[name] = calls + 1
    return found
