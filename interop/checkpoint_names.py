"""Finding an adapter's tensors in a checkpoint that names them otherwise.

An adapter names its layers as the PyTorch class did that was trained (``bert.encoder.layer.0...``),
a checkpoint as the class did that was saved. Two things set them apart. One class may have lacked
the head and with it the prefix (``encoder.layer.0...``), or had both where the other had neither.
And transformers moves modules from one release to the next while files keep the old names: LLaVA's
language model is ``model.language_model.layers.0...`` in the class of 4.52 and later and
``language_model.model.layers.0...`` in every file and in older classes, Qwen2-VL's is
``model.layers.0...`` there. `spelling` writes all generations' names of one module alike.

`CheckpointNames.fit` finds the one way in which adapter and checkpoint agree, or refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from randlora_jax.interop.errors import TargetError, listed, shown

# What transformers renamed, from the older name to the newer one: `_checkpoint_conversion_mapping`
# of its classes (4.52 to 4.57) and `conversion_mapping.py` (5), as far as they move linear layers
# and rename nothing else. Applied to both sides, so a rule that also fits a model that was not
# renamed does no harm there.
_RENAMED = tuple(
    (re.compile(r"(?<![^.])" + old), new)
    for old, new in {
        r"LayerNorm\.gamma$": "LayerNorm.weight",
        r"LayerNorm\.beta$": "LayerNorm.bias",
        r"(\w+_tower)\.(?:vision_model|timm_model)\.": r"\1.",  # CLIP and SigLIP within others
        r"block_sparse_moe\.": "mlp.",  # Mixtral, PhiMoE, MiniMax
        r"backbone\.(?=layers\.\d)": "model.",  # Nemotron-H
        r"encoder\.block\.(\d+)\.(?=\d)": r"stages.\1.blocks.",  # SegFormer
        r"mlp\.dense([12])\.": r"mlp.fc\1.",
        r"(?:encoder\.)*layers?\.(?=\d)": "layers.",  # ViT and its kin, AltCLIP
        r"attention\.(?:attention|self)\.query\.": "attention.q_proj.",  # those, Swin, SegFormer
        r"attention\.(?:attention|self)\.key\.": "attention.k_proj.",
        r"attention\.(?:attention|self)\.value\.": "attention.v_proj.",
        r"attention\.output\.dense\.": "attention.o_proj.",
        r"intermediate\.dense\.": "mlp.fc1.",
        r"output\.dense\.": "mlp.fc2.",
        r"out_proj\.": "o_proj.",  # DETR and its kin
        r"layers\.(\d+)\.fc([12])\.": r"layers.\1.mlp.fc\2.",
    }.items()
)
# Modules around a language model that come and go, in this order and that, before the number of a
# layer: LLaVA, Gemma 3, PaliGemma, Mistral 3, Qwen2-VL, Emu3, ColPali, ...
_AROUND = {"model", "language_model"}


def spelling(key: str) -> str:
    """What a tensor's names have in common in all generations of transformers.

    >>> spelling("model.language_model.layers.0.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    >>> spelling("language_model.model.layers.0.self_attn.q_proj.weight")
    'layers.0.self_attn.q_proj.weight'
    """
    for old, new in _RENAMED:
        key = old.sub(new, key)
    parts = key.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join([part for part in parts[:end] if part not in _AROUND] + parts[end:])


@dataclass(frozen=True)
class Naming:
    """From an adapter's names to a checkpoint's: drop the prefix `strip`, or put `add` before.

    Attributes:
      respelled: whether both sides are compared by their `spelling`.
    """

    strip: str = ""
    add: str = ""
    respelled: bool = False

    def __call__(self, name: str) -> str:
        """`name` as the checkpoint has it, or the checkpoint's `spelling` of it."""
        name = spelling(name) if self.respelled else name
        return self.add + name.removeprefix(self.strip)


class CheckpointNames:
    """The names of a checkpoint's tensors, to be found by those of an adapter.

    Attributes:
      naming: how the adapter's names become them; settled by `fit`.
    """

    def __init__(self, keys: Iterable[str], where: Path) -> None:
        """`where` names the checkpoint in errors."""
        self.naming = Naming()
        self._where = where
        self._as_stored = {key: [key] for key in keys}

    def fit(self, names: Iterable[str]) -> Naming:
        """Settle how the names of an adapter's layers become the checkpoint's; `find` follows it.

        The names as they are come first, then less a first part of theirs, then with a first part
        of the checkpoint's before them, and last the same by their `spelling`, whichever finds
        most layers.

        Raises:
          TargetError: two ways find as many.
        """
        keys = [f"{name}.weight" for name in names]
        best, most = [Naming()], -1
        for respelled in (False, True):
            if most == len(keys):
                break
            scores = {
                naming: sum(bool(self._found(naming, key)) for key in keys)
                for naming in self._namings(keys, respelled)
            }
            if max(scores.values()) > most:
                most = max(scores.values())
                best = [naming for naming, score in scores.items() if score == most]
        if len(best) > 1 and best[0] != Naming(respelled=best[0].respelled):
            self._refuse(best, keys)
        self.naming = best[0]
        return self.naming

    def find(self, key: str) -> str | None:
        """The checkpoint's key for a state-dict key of the adapted model; None if it has none.

        Raises:
          TargetError: it could be either of two.
        """
        respelled = replace(self.naming, respelled=True)
        for naming in (self.naming, Naming(), respelled, Naming(respelled=True)):
            found = self._found(naming, key)
            if len(found) > 1:
                raise TargetError(
                    f"{self._where}: {shown(key)} could be {' or '.join(map(shown, found))}: "
                    "transformers has called one module by both names. Give the directory of the "
                    "very model that was adapted, saved with save_pretrained"
                )
            if found:
                return found[0]
        return None

    def _refuse(self, best: list[Naming], keys: list[str]) -> None:
        found = {key: {k for naming in best for k in self._found(naming, key)} for key in keys}
        key = max(found, key=lambda key: len(found[key]))
        either = sorted(other.removesuffix(".weight") for other in found[key])
        raise TargetError(
            f"{self._where}: layer {shown(key.removesuffix('.weight'))} could be "
            f"{' or '.join(map(shown, either)) if len(either) < 4 else listed(either, 3)}. Give "
            "the directory of the very model that was adapted, saved with save_pretrained"
        )

    def _found(self, naming: Naming, key: str) -> list[str]:
        known = self._by_spelling if naming.respelled else self._as_stored
        return known.get(naming(key), [])

    def _namings(self, keys: list[str], respelled: bool) -> list[Naming]:
        strips = dict.fromkeys(key.split(".", 1)[0] + "." for key in keys if key.count(".") > 1)
        adds = dict.fromkeys(key.split(".", 1)[0] + "." for key in self._as_stored if "." in key)
        return [
            Naming(respelled=respelled),
            *(Naming(strip=prefix, respelled=respelled) for prefix in strips),
            *(Naming(add=prefix, respelled=respelled) for prefix in adds),
        ]

    @cached_property
    def _by_spelling(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self._as_stored:
            found.setdefault(spelling(key), []).append(key)
        return found
