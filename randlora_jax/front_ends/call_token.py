"""What stands for all that a call of a wrapped model depends on, and that its arguments do not tell.

A transformation inside the model (``nnx.jit``, ``nnx.remat``, ``nn.jit``) keeps what it traced for
every later call of equal arguments, of whatever model. The bases and what rows choose enter there
by closure. So a token lies among the arguments: calls that may share a trace have the same one.
"""

import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.hoisting import is_traced
from randlora_jax.models.slots import RowChoice


@dataclass(frozen=True, eq=False)
class CallToken:
    """Of one call, or of several that are equal; compared by identity."""


class TokenOfCalls:
    """Gives equal calls of one model one token; of many different ones those of late.

    Tokens stay in JAX's caches, and so may this. It keeps no bases alive.
    """

    MOST = 1024

    def __init__(self) -> None:
        self._tokens: dict[Hashable, tuple[list[weakref.ref[Any]], CallToken]] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has arrays of its own
        return type(self), ()

    def of(
        self,
        pairs: Mapping[str, BasisPair],
        choice: RowChoice | None = None,
        known: Hashable = None,
    ) -> CallToken:
        """Of a call that depends on these; of none but it, where they are traced.

        Args:
          pairs: the bases, which are told apart as objects.
          choice: what the call takes of stacks, which is told apart by its numbers.
          known: whatever else it depends on.
        """
        bases, names = jax.tree.flatten(dict(pairs))
        chosen, stacks = jax.tree.flatten(dict(choice.chosen) if choice else {})
        if is_traced((bases, chosen)) or not all(x.is_fully_addressable for x in chosen):
            return CallToken()
        rows = choice and (choice.rows, choice.beams)
        numbers = tuple((x.shape, np.asarray(x).tobytes()) for x in chosen)
        key = known, names, tuple(map(id, bases)), stacks, rows, numbers
        held, token = self._tokens.get(key, ((), None))
        if token is None or any(x() is not base for x, base in zip(held, bases, strict=True)):
            if len(self._tokens) >= self.MOST:
                self._tokens.clear()
            token = CallToken()
            self._tokens[key] = [weakref.ref(base) for base in bases], token
        return token
