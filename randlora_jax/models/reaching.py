"""Adapted layers that a model's call does not reach: they would add nothing, and train nothing."""

import re
from collections.abc import Collection, Iterable

from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import slashed


def expected(layers: Iterable[Layer], optional: Iterable[str]) -> set[str]:
    """The names of those `layers` that a call of the model must reach.

    Args:
      optional: regular expressions on the paths of layers that it may pass by.
    """
    rules = list(optional)
    return {
        layer.name
        for layer in layers
        if not any(re.fullmatch(rule, slashed(layer.path)) for rule in rules)
    }


def refuse_unreached(awaited: Collection[str]) -> None:
    """Nothing, if no layer is still awaited after a call of the whole model.

    Raises:
      ConfigError: some are.
    """
    if awaited:
        raise ConfigError(
            f"the model was called, and {listed(sorted(awaited))} did not run: what an adapter "
            "adds there has no effect, and its gradient is zero. If this call rightly passes by "
            "them (another branch, a part that other inputs use), say so with "
            "get_peft_model(..., optional=[...]), regular expressions on paths such as "
            f"{min(awaited).replace('.', '/')!r}; else leave them out of target_modules"
        )
