"""Wrapped models inside an nnx model: which wrappers are whose."""

from collections.abc import Iterable, Iterator
from typing import Any

from flax import nnx

from randlora_jax.front_ends.nnx.call import ModelToken
from randlora_jax.front_ends.nnx.layer import RandLoraLayer


def _token_of(module: nnx.Module) -> ModelToken | None:
    """That of a wrapped model; None of any other module."""
    token = vars(module).get("_token")
    return token if isinstance(token, ModelToken) else None


def depth_of(modules: Iterable[nnx.Module]) -> int:
    """How many wrapped models lie one within another among the modules of a model."""
    tokens = filter(None, map(_token_of, modules))
    return max((token.depth + 1 for token in tokens), default=0)


def wrapped_in(modules: Iterable[nnx.Module]) -> Iterator[nnx.Module]:
    """Those among the modules of a model that are wrapped models themselves."""
    return filter(_token_of, modules)


def wrappers_of_wrapped(modules: Iterable[nnx.Module]) -> set[int]:
    """The ``id`` of each wrapper that belongs to a wrapped model among `modules`.

    Args:
      modules: all of a model's.
    """
    return {id(wrapper) for module in modules for wrapper in _wrappers_of(module)}


def _wrappers_of(whole: Any) -> Iterator[RandLoraLayer]:
    """The wrappers in a wrapped model that have its token; none in any other module."""
    token = _token_of(whole)
    for _, module in nnx.iter_modules(whole.model) if token else ():
        if isinstance(module, RandLoraLayer) and module.randlora_settings.model == token:
            yield module
