"""What a model is called with, so that a run without numbers tells its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from randlora_jax.interop.errors import ConfigError


@dataclass(frozen=True)
class SampleInputs:
    """Arguments of one call of a model; arrays may be ``jax.ShapeDtypeStruct``.

    Args:
      args: by position.
      kwargs: by keyword.
      method: of the model, or its name; None for its call.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    method: Callable[..., Any] | str | None = None

    @classmethod
    def of(cls, stated: SampleInputs | tuple[Any, ...] | Mapping[str, Any] | None) -> Any:
        """What a user states: a tuple of arguments, a dict of keyword arguments, or all of it.

        Raises:
          ConfigError: it is none of these.
        """
        if stated is None or isinstance(stated, cls):
            return stated
        if isinstance(stated, tuple):
            return cls(stated)
        if isinstance(stated, Mapping):
            return cls((), stated)
        raise ConfigError(
            "sample_inputs: expected a tuple of what the model is called with, such as (x,), a "
            "dict of keyword arguments, or SampleInputs(args, kwargs, method), found a "
            f"{type(stated).__name__}"
        )
