"""A wrapper's call shows the signature of what it wraps.

Trainers and samplers look at a model's signature to learn what it can be called with.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Call = TypeVar("Call", bound=Callable[..., Any])


class _Shown:
    """A method that is seen, from each instance, as another callable of that instance."""

    def __init__(self, method: Callable[..., Any], of: Callable[[Any], Any]) -> None:
        self._method, self._of = method, of
        method._shown = self  # type: ignore[attr-defined]
        self.__doc__ = method.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's, for ``nnx.capture``, which takes it from the class as it lies there."""
        return self._method(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        bound = functools.partial(self._method, instance)
        bound.__wrapped__ = self._of(instance).__call__  # type: ignore[attr-defined]
        return bound


class KeepsShown(type):
    """Of classes whose methods other libraries replace and put back, as ``nnx.tabulate`` does.

    What they put back is what a class gives, a plain function, in place of what shows another.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        shown = getattr(value, "_shown", None)
        put_back = shown is not None and shown._method is value
        super().__setattr__(name, shown if put_back else value)


def shows_call_of(of: Callable[[Any], Any]) -> Callable[[Call], Call]:
    """Decorates ``__call__``: ``inspect.signature(x.__call__)`` is that of ``of(x).__call__``."""

    def shown(call: Call) -> Call:
        return cast(Call, _Shown(call, of))

    return shown
