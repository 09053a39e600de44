"""Parts of a wrapped nnx model that are reached through the wrapper, and run with its adapters."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from flax import nnx

Opened = Callable[[], AbstractContextManager[None]]


class Part:
    """A module of a wrapped model: called, or asked for methods and parts of its own.

    Args:
      module: in the wrapped model.
      opened: opens the context in which the model's layers find its bases.
    """

    def __init__(self, module: nnx.Module, opened: Opened) -> None:
        object.__setattr__(self, "_part", (module, opened))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        module, opened = self._part
        with opened():
            return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_part":  # not made yet, as under copy
            raise AttributeError(name)
        module, opened = self._part
        return reached_through(getattr(module, name), opened)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._part[0], name, value)

    def __getitem__(self, key: Any) -> Any:
        module, opened = self._part
        return reached_through(module[key], opened)

    def __iter__(self) -> Iterator[Any]:
        module, opened = self._part
        return (reached_through(item, opened) for item in module)

    def __len__(self) -> int:
        return len(self._part[0])

    def __repr__(self) -> str:
        return f"part of a wrapped model: {self._part[0]!r}"


def reached_through(found: Any, opened: Opened) -> Any:
    """What a wrapped model hands out: its modules as parts, its methods with its context open."""
    if isinstance(found, nnx.Module):
        return Part(found, opened)
    if type(found) in (list, tuple):
        return type(found)(reached_through(item, opened) for item in found)
    if type(found) is dict:
        return {key: reached_through(item, opened) for key, item in found.items()}
    if not inspect.ismethod(found) and not isinstance(found, functools.partial):
        return found

    @functools.wraps(found)
    def method(*args: Any, **kwargs: Any) -> Any:
        with opened():
            return found(*args, **kwargs)

    return method
