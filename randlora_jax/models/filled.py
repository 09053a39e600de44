"""A wrapped model of shapes alone (`core.abstract`) is asked for numbers."""

from collections.abc import Iterable
from typing import Any

from randlora_jax.core.abstract import some_abstract
from randlora_jax.interop.errors import ConfigError


def refuse_abstract(arrays: Iterable[Any]) -> None:
    """Nothing, if all arrays of some trees have numbers.

    Raises:
      ConfigError: one is a shape alone.
    """
    if some_abstract(list(arrays)):
        raise ConfigError(
            "this wrapped model is abstract: it has shapes and no numbers yet. Fill it first with "
            "what was restored: nnx.update(model, state), or model.variables = variables where it "
            "has these"
        )
