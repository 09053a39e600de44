"""What the numbers of an adapter are drawn from: an ``nnx.Rngs``, or one of JAX's random keys."""

from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax.interop.errors import ConfigError, shown

_STREAMS = "params", "dropout"  # of lambda; of adapter dropout, in nnx


def is_key(rngs: Any) -> bool:
    """Whether `rngs` is one of JAX's random keys, of the new kind or the old one."""
    if not isinstance(rngs, jax.Array):
        return False
    is_new = jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key)
    return rngs.ndim == 0 if is_new else rngs.ndim == 1 and rngs.dtype == jnp.uint32


def refuse_others(rngs: Any) -> None:
    """Nothing, if something can be drawn from what a user gave as `rngs`.

    Raises:
      ConfigError: it is neither.
    """
    if not (is_key(rngs) or any(_has(rngs, stream) for stream in _STREAMS)):
        raise ConfigError(
            "rngs: expected nnx.Rngs(seed) or a key such as jax.random.key(seed), found "
            f"{shown(rngs)}"
        )


def refuse_without(rngs: Any, stream: str, who: str) -> None:
    """Nothing, if `rngs` is a key, or has a stream or the default one in its place.

    Args:
      who: what draws from it.

    Raises:
      ConfigError: it has neither.
    """
    if not (is_key(rngs) or _has(rngs, stream)):
        raise ConfigError(
            f"rngs: {who} draws from the stream {stream!r}: expected that or a default one, as "
            f"nnx.Rngs({stream}=seed) or nnx.Rngs(seed) has, found neither"
        )


def _has(rngs: Any, stream: str) -> bool:
    with suppress(KeyError):  # flax says so of a stream that is not there
        return callable(getattr(rngs, stream, None))
    return False
