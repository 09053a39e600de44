"""Parts of a wrapped nnx model that are reached through the wrapper, and run with its adapters."""

import functools
import inspect
from collections.abc import Callable, Generator, ItemsView, Iterator, Mapping, ValuesView
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx

from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.shown_signature import shows_call_of
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.model import RandLoraModel

Opened = Callable[..., AbstractContextManager[None]]  # of adapter_names, where a call has them


class Part:
    """A module of a wrapped model: called, or asked for methods and parts of its own.

    Args:
      module: in the wrapped model.
      opened: opens the context in which the model's layers find its bases.
    """

    def __init__(self, module: nnx.Module, opened: Opened) -> None:
        object.__setattr__(self, "_part", (module, opened))

    @shows_call_of(lambda self: self._part[0])
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module; as the whole model with ``adapter_names``."""
        module, opened = self._part
        with _with_rows(module, opened, kwargs)():
            return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_part":  # not made yet, as under copy
            raise AttributeError(name)
        module, opened = self._part
        if isinstance(module, Mapping) and name in _VIEWS:
            return functools.partial(_VIEWS[name], self)
        return attribute(module, name, opened)

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

    def __bool__(self) -> bool:
        return bool(self._part[0])

    def __repr__(self) -> str:
        return f"part of a wrapped model: {self._part[0]!r}"


def _refuse_pytree(part: Part, children: Any = None) -> Any:
    module = part._part[0]
    kind = type(module.base_layer if isinstance(module, RandLoraLayer) else module).__name__
    raise ConfigError(
        f"this {kind} is part of a wrapped model, which alone can run it: it is no module or "
        "pytree of its own. Pass the model, as in nnx.jit(lambda model, x: model.encoder(x))"
        "(model, x); its arrays are among those of model.model, as in "
        "nnx.state(model.model.encoder)"
    )


jax.tree_util.register_pytree_node(Part, _refuse_pytree, _refuse_pytree)


_VIEWS: dict[str, Callable[[Any], Any]] = {"items": ItemsView, "values": ValuesView}


def attribute(module: nnx.Module, name: str, opened: Opened) -> Any:
    """What a module of a wrapped model has under `name`, as it is reached through the wrapper."""
    holder = module.base_layer if isinstance(module, RandLoraLayer) else module
    if not isinstance(getattr(type(holder), name, None), property | functools.cached_property):
        return reached_through(getattr(module, name), opened)
    with opened():
        found = getattr(module, name)
    return reached_through(found, opened)


def reached_through(found: Any, opened: Opened) -> Any:
    """What a wrapped model hands out: its modules as parts, its methods with its context open.

    So is what its methods return, and what they yield.
    """
    if isinstance(found, nnx.Module):
        return Part(found, opened)
    if type(found) in (list, tuple, dict):
        keys = list(found) if type(found) is dict else range(len(found))
        parts = {key: reached_through(found[key], opened) for key in keys}
        if all(parts[key] is found[key] for key in keys):
            return found
        return parts if type(found) is dict else type(found)(parts.values())
    if inspect.isgenerator(found):
        return _resumed(found, opened)
    if not inspect.ismethod(found) and not isinstance(found, functools.partial):
        return found

    @functools.wraps(found)
    def method(*args: Any, **kwargs: Any) -> Any:
        mine = _with_rows(found, opened, kwargs)
        with mine():
            result = found(*args, **kwargs)
        return reached_through(result, mine if inspect.isgenerator(result) else opened)

    return method


def _with_rows(called: Any, opened: Opened, kwargs: dict[str, Any]) -> Opened:
    """`opened` for the ``adapter_names`` in `kwargs`, which are taken out of there.

    Not where they are for what is called: another wrapped model, or a method that asks for them.
    """
    if "adapter_names" not in kwargs or isinstance(
        getattr(called, "__self__", called), RandLoraModel
    ):
        return opened
    if "adapter_names" in inspect.signature(called).parameters:
        return opened
    return functools.partial(opened, kwargs.pop("adapter_names"))


def _resumed(generator: Iterator[Any], opened: Opened) -> Generator[Any, None, None]:
    """What `generator` yields: it runs with the context open, and its user without."""
    while True:
        with opened():
            try:
                item = next(generator)
            except StopIteration:
                return
        yield reached_through(item, opened)
