"""Interceptors of others (``nn.intercept_methods``) around what an adapted layer returns.

flax runs all that were entered around each method, the last one innermost. Ours is among them, and
runs the layer that it meets again, inside that layer's own call: those of others have met it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import flax.linen as nn
from flax.linen.module import InterceptorContext as Context

Call = Callable[..., Any]


@dataclass(frozen=True)
class Ours:
    """One that joins adapters in."""

    run: Call

    def __call__(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context
    ) -> Any:
        """What the method returns."""
        return self.run(call, args, kwargs, context)


def _entered() -> Any:
    """Those of this thread; the last one comes first."""
    return nn.module._global_interceptor_stack  # flax has no public name for it


def _is_foreign(interceptor: Call) -> bool:
    return not isinstance(interceptor, Ours)


def others_entered() -> bool:
    """Whether there are any but ours."""
    return any(map(_is_foreign, _entered()))


def entered_since() -> list[Call]:
    """Those that the model has entered since ours, the last one first."""
    return list(takewhile(_is_foreign, _entered()))


def within(interceptors: list[Call], call: Call, context: Context) -> Call:
    """`call` with `interceptors` around, the first one innermost."""
    for interceptor in interceptors:
        call = partial(_intercepted, interceptor, call, context)
    return call


def _intercepted(
    interceptor: Call, call: Call, context: Context, /, *args: Any, **kwargs: Any
) -> Any:
    return interceptor(call, args, kwargs, context)


class MetInside(Exception):
    """Interceptors of others would meet a method inside of a layer that runs alone."""


@contextmanager
def met_already(*, alone: bool = False) -> Iterator[None]:
    """Within, the first method that is called is one that the interceptors of others have met.

    Args:
      alone: they shall meet no other.

    Raises:
      MetInside: they would.
    """
    if not others_entered():
        yield
        return
    entered = list(_entered())
    _put([_past_first(other, alone) if _is_foreign(other) else other for other in entered])
    try:
        yield
    finally:
        _put(entered)


def _put(interceptors: list[Call]) -> None:
    """These in place of those that are entered."""
    stack = _entered()
    while stack:
        stack.pop()
    for interceptor in reversed(interceptors):
        stack.push(interceptor)


def _past_first(interceptor: Call, alone: bool) -> Call:
    """`interceptor` from the second method on; a ``setup`` before is a part of the first."""
    begun = False

    def later(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context) -> Any:
        nonlocal begun
        if begun and alone:
            raise MetInside("methods inside it are intercepted (nn.intercept_methods)")
        if begun:
            return interceptor(call, args, kwargs, context)
        begun = context.method_name != "setup"
        return call(*args, **kwargs)

    return later
