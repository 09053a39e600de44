"""Methods of linen modules run with other params, by flax's own lifting."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from randlora_jax.core.hoisting import Hoisted, is_traced
from randlora_jax.front_ends.linen.interceptors import met_already

Params = Mapping[str, Any]


_SCOPED = (nn.Module, nn.Variable)  # they belong to a scope, which is lifted with them


class HandsOutModules(Exception):
    """A method returned modules, which would not live outside of a transformation."""


def runs(context: nn.module.InterceptorContext) -> bool:
    """Whether a method computes something: looking up an attribute does not, as ToLinen does it."""
    return context.method_name not in ("setup", "__getattr__")


def is_lifted(context: nn.module.InterceptorContext) -> bool:
    """Whether flax will call the method again, on what a transformation leaves of the variables.

    Of a class or a method that was given to ``nn.scan``, ``nn.vmap``, ``nn.remat``, ``nn.jit``.
    """
    made_in = getattr(method_of(context), "__globals__", {}).get("__name__")
    return made_in == nn.transforms.__name__


def method_of(context: nn.module.InterceptorContext) -> Callable[..., Any]:
    """The function that is being called, which takes its module first."""
    method: Callable[..., Any] = context.orig_method.func
    return method


def maps_around(module: nn.Module) -> int:
    """Inside how many ``nn.map_variables`` a module runs."""
    return sum(part.count("map_variables(") for part in module.scope.debug_path)


def run_with(
    module: nn.Module,
    method: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    change: Callable[[Params], Params],
) -> Any:
    """What `method` of `module` returns where its params are `change` of them.

    Where it is traced it is rematerialised, so that no changed params wait for the backward pass.

    Raises:
      HandsOutModules: it returns modules.
    """
    values, passed = Hoisted.of(arguments, (jax.Array, *_SCOPED))
    aside: list[Hoisted] = []  # what of the output is no array

    def body(module: nn.Module, *passed: Any) -> list[jax.Array]:
        args, kwargs = values.with_arrays([*passed])
        rest, arrays = Hoisted.of(method(module, *args, **kwargs))
        if any(isinstance(other[1], _SCOPED) for other in rest.others if other):
            raise HandsOutModules
        aside.append(rest)
        return arrays

    def changed(collections: Mapping[str, Any]) -> Mapping[str, Any]:
        if "params" not in collections:
            return collections
        return {**collections, "params": change(collections["params"])}

    lifted = nn.map_variables(body, "params", trans_in_fn=changed, mutable=False)
    read = (module.variables, passed)
    if is_traced(read):
        lifted = nn.remat(lifted)
    with met_already():  # `body` is no method of the module's
        arrays = lifted(module, *passed)
    return aside[-1].with_arrays(arrays)
