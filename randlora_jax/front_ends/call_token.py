"""What stands for all that a wrapped model's call depends on and that its arguments do not tell.

A transformation inside the model (``nnx.jit``, ``nnx.remat``, ``nn.jit``) keeps what it traced for
every later call of equal arguments, of whatever model. The bases and what rows choose enter there
by closure. So a token lies among the arguments: calls that may share a trace have the same one.
"""

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.hoisting import is_traced
from randlora_jax.models.slots import RowChoice


@dataclass(frozen=True, eq=False)
class CallToken:
    """Of one call, or of several that are equal; compared by identity."""


class Bases:
    """The bases of a call, as long as somebody else keeps them: at least what was traced with them.

    Args:
      arrays: theirs.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = [weakref.ref(x) for x in arrays]

    @property
    def alive(self) -> bool:
        """Whether all of them are still there."""
        return all(x() is not None for x in self._arrays)

    def are(self, arrays: Sequence[Any]) -> bool:
        """Whether they are these."""
        return all(x() is new for x, new in zip(self._arrays, arrays, strict=True))

    def equal(self, arrays: Sequence[Any]) -> bool:
        """Whether they have the same numbers, as after a step that handed them through."""
        return all(_equal(x(), new) for x, new in zip(self._arrays, arrays, strict=True))


def _equal(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if not all(isinstance(x, jax.Array) and x.is_fully_addressable for x in (old, new)):
        return False
    if old.is_deleted() or (old.dtype, old.sharding) != (new.dtype, new.sharding):
        return False
    with jax.ensure_compile_time_eval():
        return bool(jnp.array_equal(old, new))


class TokenOfCalls:
    """Gives equal calls of one model one token; of many different ones those of late.

    Tokens stay in JAX's caches, and so may this. It keeps no bases alive.
    """

    MOST = 1024

    def __init__(self) -> None:
        self._given: dict[Hashable, list[tuple[Bases, CallToken]]] = {}

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
          pairs: the bases.
          choice: what the call takes of stacks.
          known: whatever else it depends on.
        """
        bases, names = jax.tree.flatten(dict(pairs))
        chosen, stacks = jax.tree.flatten(dict(choice.chosen) if choice else {})
        if is_traced((bases, chosen)) or not all(x.is_fully_addressable for x in chosen):
            return CallToken()
        rows = choice and (choice.rows, choice.beams)
        numbers = tuple((x.shape, np.asarray(x).tobytes()) for x in chosen)
        key = known, names, stacks, rows, numbers
        if key not in self._given and len(self._given) >= self.MOST:
            self._given.clear()
        held = [(old, token) for old, token in self._given.get(key, ()) if old.alive]
        self._given[key] = held
        for same, token in held:
            if same.are(bases):
                return token
        token = next((token for like, token in held if like.equal(bases)), CallToken())
        held.append((Bases(bases), token))
        return token
