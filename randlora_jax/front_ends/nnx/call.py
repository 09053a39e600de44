"""What the adapted layers of one nnx model share while it is called.

A Variable shared by all layers would be one leaf to ``nnx.split`` but one for each layer to
``jax.tree.leaves``, would lose its sharing in ``jax.tree.map`` and could not pass a user's
``nnx.scan``. So the root wrapper alone owns the bases, and its call opens a context from which its
layers take them, under whatever transformation they run.
"""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from randlora_jax.core.bases import BasisPair
from randlora_jax.interop.errors import ConfigError


class ModelToken:
    """Ties layers to the one model whose call they belong to; compared by identity.

    Copies that flax makes of a model share it.

    Args:
      reached: names of the layers that some call did reach.
    """

    def __init__(self) -> None:
        self.reached: set[str] = set()


@dataclass(frozen=True)
class CallContext:
    """What a model's layers read in its call.

    Args:
      pairs: the shared bases, by their identity as text.
    """

    pairs: Mapping[str, BasisPair]


# By model, so that wrapped models may call one another.
_open: contextvars.ContextVar[Mapping[ModelToken, CallContext] | None] = contextvars.ContextVar(
    "randlora_calls", default=None
)


@contextlib.contextmanager
def opened(model: ModelToken, context: CallContext) -> Iterator[None]:
    """Within, the layers of `model` find `context`."""
    token = _open.set({**(_open.get() or {}), model: context})
    try:
        yield
    finally:
        _open.reset(token)


def is_open(model: ModelToken) -> bool:
    """Whether `model` is being called."""
    return model in (_open.get() or {})


def reached(model: ModelToken, layer_names: Iterable[str]) -> CallContext:
    """The open context of `model`, for layers of it that run now.

    Raises:
      ConfigError: the model is not being called.
    """
    found = (_open.get() or {}).get(model)
    names = list(layer_names)
    if found is None:
        raise ConfigError(
            f"layer {names[0]!r} was called outside its RandLoraModel, which holds the shared "
            "bases: call the wrapped model, its methods, or its parts as the wrapped model's "
            "attributes"
        )
    model.reached.update(names)
    return found
