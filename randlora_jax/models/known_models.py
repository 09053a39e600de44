"""Model classes whose PyTorch twins are known, found by name: nothing of theirs is imported."""

from dataclasses import replace
from typing import Any

from randlora_jax.models.known import bonsai, deepmind_gemma, easydel, maxtext, openpi, tunix
from randlora_jax.models.known.entry import Entries
from randlora_jax.models.known.entry import KnownModel as KnownModel
from randlora_jax.models.layer_types import look_up

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
        known = look_up(_ENTRIES, kind)
        if known is not None:
            return _with_ties(known(model) if callable(known) else known, model)
    return KnownModel()


def _with_ties(known: KnownModel, model: Any) -> KnownModel:
    """Without ties where the model has a head of its own, so makes no logits with its embedding."""
    if not any(hasattr(model, head) for _, head in known.info.tied):
        return known
    return replace(known, info=replace(known.info, tied=()))
