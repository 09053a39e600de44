"""A linen layer as a function of its kernel and its input, and of all else that it reads."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
from flax.core.scope import LazyRng

from randlora_jax.core.hoisting import Hoisted
from randlora_jax.core.layer_call import Run, comparable
from randlora_jax.front_ends.call_input import CallInput, with_input
from randlora_jax.front_ends.linen.interceptors import met_already, others_entered
from randlora_jax.front_ends.linen.types import may_change
from randlora_jax.front_ends.params import flat, with_leaves
from randlora_jax.models.names import Path
from randlora_jax.models.quantised import quantiser_around

_KERNEL = "kernel"  # stands in its place


class ChangesState(Exception):
    """A layer that runs alone changes its collections."""


@dataclass(frozen=True)
class RunAlone:
    """Runs a linen module whose arrays come apart.

    Args:
      module: unbound.
      leaf: where the kernel is among its params.
      place: where its input stands among the arguments.
      values: of its params without the kernel, its other collections and rngs, and the call's
        other arguments.
      quantiser: the class around it that quantises, which tells apart layers that are alike.
      path: of the module in its model, where what it computes may depend on that: a quantiser has
        rules by path. Else () for all, so that layers which are alike but for it are equal.
      intercepted: methods are, by others: a trace that was made without has met nobody inside.
      mutable: collections that it may change in this call; False for none.

    Raises:
      MetInside: they would be intercepted inside of it.
      ChangesState: it changes some.
    """

    module: nn.Module
    leaf: Path
    place: int | str
    values: Hoisted
    quantiser: type | None
    path: Path
    intercepted: bool
    mutable: bool | tuple[str, ...]

    def __call__(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the module returns."""
        params, others, rngs, args, kwargs = self.values.with_arrays([*read])
        args, kwargs = with_input((args, kwargs), self.place, x)
        variables = {**others, "params": with_leaves(params, {self.leaf: kernel})}
        method = method_at(self.path, "__call__", alone=True)
        mutable = self.mutable
        out = self.module.apply(
            variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
        )
        if mutable is not False:
            out, after = cast(tuple[Any, Mapping[str, Any]], out)
            was = flat(variables)
            if any(leaf is not was.get(path) for path, leaf in flat(after).items()):
                raise ChangesState("it changes its collections in this call")
        return cast(jax.Array, out)


def method_at(
    path: Path, name: str, *, parent: Any = None, alone: bool = False
) -> Callable[..., Any]:
    """A method of a module that is applied by itself, in the middle of its own call.

    Args:
      path: where the module is in its model.
      name: of the method.
      parent: of the module in its model, for what looks around from within.
      alone: interceptors of others shall meet nothing inside of it.
    """

    def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        module.scope.path = path
        if parent is not None:
            object.__setattr__(module, "parent", parent)  # frozen, and bound already
        with met_already(alone=alone):
            return getattr(module, name)(*args, **kwargs)

    return method


def alone(
    module: nn.Module, params: Mapping[str, Any], leaf: Path, taken: CallInput
) -> tuple[Run, list[jax.Array]]:
    """A bound layer by itself, and every array that it reads besides its kernel and its input.

    Args:
      params: its own, and nothing beside them.
      leaf: where its kernel is among them.
    """
    others = {name: held for name, held in module.variables.items() if name != "params"}
    rest = with_leaves(params, {leaf: _KERNEL})
    values, read = Hoisted.of((rest, others, rngs_of(module), *taken.rest))
    bare = module.clone(parent=None, name=None)
    quantiser = quantiser_around(map(type, around(module)))
    path = module.path if quantiser else ()
    how = quantiser, path, others_entered(), may_change(module)
    return comparable(RunAlone(bare, leaf, taken.place, values, *how)), read


def around(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those that it lies in, outwards."""
    inner: Any = module
    while isinstance(inner, nn.Module):
        yield inner
        inner = inner.parent


def rngs_of(module: nn.Module) -> dict[str, LazyRng]:
    """What a module draws from in this call: the first time, the very numbers of a plain call."""
    scope = module.scope
    found = {}
    for name, rng in scope.rngs.items():
        calls = scope.rng_counters[name]
        found[name] = LazyRng.create(rng, *([calls] if calls else []))
        scope.rng_counters[name] = calls + 1
    return found
