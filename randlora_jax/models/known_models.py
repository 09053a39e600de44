"""Model classes whose PyTorch twins are known, found by name: nothing of theirs is imported."""

from typing import Any

from randlora_jax.models.known import bonsai, deepmind_gemma, easydel, maxtext, openpi, tunix
from randlora_jax.models.known.entry import Entries
from randlora_jax.models.known.entry import KnownModel as KnownModel

_ENTRIES: Entries = {
    **tunix.ENTRIES,
    **bonsai.ENTRIES,
    **deepmind_gemma.ENTRIES,
    **maxtext.ENTRIES,
    **easydel.ENTRIES,
    **openpi.ENTRIES,
}


def about(model: Any) -> KnownModel:
    """What is known of a model, or of the nearest class it derives from; else nothing."""
    for kind in type(model).__mro__:
        known = _ENTRIES.get(f"{kind.__module__}.{kind.__qualname__}")
        if known is not None:
            return known(model) if callable(known) else known
    return KnownModel()
