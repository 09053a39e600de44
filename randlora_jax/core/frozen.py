"""What has no gradient: who differentiates it is told.

The bases are never trained, and their gradients are zero; of a merged adapter there is none.
"""

from functools import partial
from typing import Any, TypeVar

import jax

from randlora_jax.core.hoisting import is_traced
from randlora_jax.interop.errors import ConfigError, warn

Pairs = TypeVar("Pairs")


def never_trained(pairs: Pairs, instead: str) -> Pairs:
    """`pairs`, a pytree of bases; their tangents are zero.

    Warns, while a gradient is traced, if it is one of the bases' as well: then it is the base
    model's too, which costs as much as full fine-tuning. Gradients of anything else say nothing.

    Args:
      instead: what that may train and what to differentiate, for the warning.
    """
    if not is_traced(pairs):
        return pairs
    return jax.tree.map(jax.lax.stop_gradient, _noticed(pairs, instead))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _noticed(pairs: Pairs, instead: str) -> Pairs:
    return pairs


@_noticed.defjvp
def _is_differentiated(
    instead: str, primals: tuple[Pairs], tangents: tuple[Pairs]
) -> tuple[Pairs, Pairs]:
    warn(
        f"You differentiate the whole base model; {instead} (This gradient is taken with respect "
        "to the shared random bases as well, which are never trained: theirs is zero.)"
    )
    return primals[0], tangents[0]


def refuse_gradient(x: jax.Array, why: str) -> None:
    """Nothing, if no gradient of `x` is traced.

    Raises:
      ConfigError: one is; its text is `why`.
    """
    if is_traced(x):
        _refused(x, why)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _refused(x: jax.Array, why: str) -> jax.Array:
    return x


@_refused.defjvp
def _is_asked_for(why: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    raise ConfigError(why)
