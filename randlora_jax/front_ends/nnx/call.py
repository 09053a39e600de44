"""What the adapted layers of one nnx model share while it is called.

A Variable shared by all layers would be one leaf to ``nnx.split`` but one for each layer to
``jax.tree.leaves``, would lose its sharing in ``jax.tree.map`` and could not pass a user's
``nnx.scan``. So the root wrapper alone owns the bases, and its call opens a context from which its
layers take them, under whatever transformation they run.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax

from randlora_jax.core.bases import BasisPair, used_extents
from randlora_jax.front_ends.call_token import CallToken, TokenOfCalls
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import Layer
from randlora_jax.models.registry import AdapterSpec
from randlora_jax.models.slots import RowChoice, Stack

Applied = Sequence[tuple[Layer, Sequence[AdapterSpec | Stack]]]  # layers, and what changes each


@dataclass(frozen=True)
class ModelToken:
    """Ties layers to the model whose call they belong to.

    A static part of the model and of its layers, so it is compared by value: models that are alike
    have equal tokens, and share what ``jit`` compiled. (``nnx.jit`` even puts the one's token in
    place of the other's.) Of several models with equal tokens, layers belong to the nearest around
    them; in a call, to the innermost that is open and has the bases which they slice.

    Args:
      kind: class of the base model.
      depth: how many wrapped models lie one within another in it.
      reached: names of the layers that some call did reach.
      calls: gives tokens to its calls.
    """

    kind: type
    depth: int
    reached: set[str] = field(default_factory=set, compare=False)
    calls: TokenOfCalls = field(default_factory=TokenOfCalls, compare=False)


@dataclass(frozen=True)
class CallContext:
    """What a model's layers read in its call.

    Args:
      model: its token.
      pairs: the shared bases, by their identity as text.
      rows: what the call takes of stacked adapters; None where it applies the active ones.
    """

    model: ModelToken
    pairs: Mapping[str, BasisPair]
    rows: RowChoice | None = None

    @property
    def by_row(self) -> RowChoice | None:
        """What each row takes of stacked adapters; None where all are alike."""
        return self.rows if self.rows and not self.rows.alike else None

    @functools.cached_property
    def token(self) -> CallToken:
        """What stands for it in caches of traces."""
        return self.model.calls.of(self.pairs, self.rows)

    def serves(self, model: ModelToken, applied: Applied) -> bool:
        """Whether it is of such a model, and has the bases that its layers slice."""
        return model == self.model and all(
            self._holds(str(spec.identity), layer.matrix, spec.identity.r)
            for layer, specs in applied
            for spec in specs
        )

    def _holds(self, identity: str, matrix: tuple[int, int], r: int) -> bool:
        if identity not in self.pairs:
            return False
        a, b = self.pairs[identity]
        needed = used_extents(matrix, r)
        return needed == needed._replace(
            max=min(needed.max, b.shape[0]),
            n=min(needed.n, b.shape[1]),
            min=min(needed.min, a.shape[1]),
        )


# Innermost last: wrapped models may call one another.
_open: contextvars.ContextVar[tuple[CallContext, ...]] = contextvars.ContextVar(
    "randlora_calls", default=()
)


@contextlib.contextmanager
def opened(context: CallContext) -> Iterator[None]:
    """Within, the layers of its model find `context`."""
    token = _open.set((*_open.get(), context))
    try:
        yield
    finally:
        _open.reset(token)


@dataclass(frozen=True)
class OpenCalls:
    """Part of every layer: shows transformations which calls are open when they take the layer.

    A pytree without leaves, whose structure says so. Outside of any call it is always the same.
    """


def _shown(_: OpenCalls) -> tuple[tuple[()], tuple[CallToken, ...]]:
    return (), tuple(context.token for context in _open.get())


jax.tree_util.register_pytree_node(OpenCalls, _shown, lambda shown, leaves: OpenCalls())


def open_for(model: ModelToken, applied: Applied) -> CallContext | None:
    """The open context of `model` that serves layers of it; None while it is not called."""
    return next((c for c in reversed(_open.get()) if c.serves(model, applied)), None)


def some_rows_differ() -> bool:
    """Whether a call is open, of whatever model, whose rows have adapters of their own."""
    return any(context.by_row for context in _open.get())


def reached(model: ModelToken, applied: Applied) -> CallContext:
    """The open context of `model`, for layers of it that run now.

    Raises:
      ConfigError: the model is not being called, or lacks the bases that they slice.
    """
    found = open_for(model, applied)
    if found is None and any(context.model == model for context in _open.get()):
        raise ConfigError(
            f"layer {applied[0][0].name!r} slices shared bases that the model which is being "
            "called does not hold, or not as large: a state of before an adapter was added has "
            "replaced them (nnx.update), and model.draw_bases() draws them anew; or the layer is "
            "another RandLoraModel's, which must be called"
        )
    if found is None:
        raise ConfigError(
            f"layer {applied[0][0].name!r} was called outside its RandLoraModel, which holds the "
            "shared bases: call the wrapped model, its methods, or its parts as the wrapped "
            "model's attributes"
        )
    found.model.reached.update(layer.name for layer, _ in applied)
    return found
