"""``randlora-jax verify``: whether PyTorch PEFT and this library read an adapter alike."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.inputs import add_inputs, deltas_of, read_showing_progress
from randlora_jax.commands.peft_model import PeftTwin
from randlora_jax.commands.report import Commands, Misuse, Report, command_parser
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.keys import trained_tensors

DELTAS, LOGITS = 1e-5, 1e-5
TWINS = 1e-3  # base models that differ by more are not the same model

DESCRIPTION = f"""\
Open the adapter in DIR with PyTorch PEFT and with this library, and compare what they make of it:
delta_W of every layer; every tensor that was trained whole; and, where Hugging Face has a Flax
class for the model, logits. Needs PyTorch:  pip install "randlora-jax[torch,hf]"

  randlora-jax verify my-adapter --base my-model

Tolerances are relative to the largest number there: {DELTAS:g} for delta_W, none for tensors, for
logits {LOGITS:g} or twice what the base models differ by without an adapter. Exit status 1 if
anything is beyond them."""


@dataclass(frozen=True)
class Difference:
    """How far two readings of one thing are apart, relative to the largest number in PEFT's."""

    kind: str
    what: str
    found: float
    allowed: float

    @property
    def good(self) -> bool:
        """Within what is allowed; NaN is not."""
        return self.found <= self.allowed


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "verify", "compare with PyTorch PEFT", DESCRIPTION)
    add_inputs(parser)
    return parser


def run(args: argparse.Namespace) -> Report:
    """Do what `DESCRIPTION` says."""
    return verify(args.dir, base=args.base, torch_generation=args.torch_generation)


def verify(
    directory: str | Path, *, base: str | Path, torch_generation: str | None = None
) -> Report:
    """Compare PEFT's reading of an adapter with ours; the report is good where they agree.

    Args:
      base: the base model's directory.
      torch_generation: as for `Deltas`.

    Raises:
      RandLoraError: we cannot read the adapter, or it does not fit the base model.
      Misuse: PyTorch, transformers or PEFT cannot be imported.
    """
    for name in ("torch", "transformers", "peft"):
        try:
            import_module(name)
        except ImportError as error:
            raise Misuse(
                f"verify compares with PyTorch PEFT, and {name} cannot be imported ({error}): "
                'pip install "randlora-jax[torch,hf]"'
            ) from error
    adapter = read_showing_progress(directory)
    with BaseModel(base) as model:
        deltas = deltas_of(adapter, model, torch_generation)
        theirs = PeftTwin(adapter, directory, base)
        layers, tensors = theirs.deltas(), theirs.saved()
        found = [
            difference("delta_W", name, deltas.of(name), layers[name], DELTAS)
            for name in deltas.layers
            if name in layers
        ]
    whole = trained_tensors(adapter.saved)
    # PEFT rounds to the base model's dtype, which is kept only where PEFT has to draw the bases
    allowed = 0.0 if adapter.bases is not None else 2**-8
    found += [
        difference("trained tensors", key, value.astype(np.float32), tensors[key], allowed)
        for key, value in whole.items()
        if key in tensors
    ]
    one_sided = (layers.keys() ^ deltas.layers.keys()) | (whole.keys() - tensors.keys())
    logits, note = _logits(theirs, directory, torch_generation)
    return _report(found + logits, sorted(one_sided), note)


def difference(
    kind: str, what: str, ours: np.ndarray, theirs: np.ndarray, allowed: float
) -> Difference:
    """Compare two arrays; infinitely far where their shapes differ."""
    if ours.shape != theirs.shape:
        return Difference(kind, what, float("inf"), allowed)
    scale = float(np.abs(theirs).max()) or 1.0
    return Difference(kind, what, float(np.abs(ours - theirs).max()) / scale, allowed)


def _logits(
    theirs: PeftTwin, directory: str | Path, torch_generation: str | None
) -> tuple[list[Difference], str]:
    """Compare logits of random tokens; or say why not."""
    if theirs.flax is None:
        return [], f"logits not compared: {theirs.why_not}"
    import jax

    from randlora_jax import RandLoraModel

    inputs = theirs.inputs
    with jax.default_matmul_precision("highest"):
        try:
            before = _first(theirs.flax(**inputs))
        except Exception as error:  # without any adapter, so it says nothing about this one
            return [], f"logits not compared: {type(theirs.flax).__name__} fails ({error})"
        twins = difference("logits", "", before, theirs.before, TWINS)
        if not twins.good:
            return [], (
                f"logits not compared: without an adapter {type(theirs.flax).__name__} and PyTorch "
                f"differ by {twins.found:.1e} of the largest, so they are not the same model"
            )
        ours: Any = RandLoraModel.from_pretrained(
            theirs.flax, directory, torch_generation=torch_generation
        )
        after = _first(ours(**inputs))
    allowed = max(LOGITS, 2 * twins.found)
    return [difference("logits", "random tokens", after, theirs.logits(), allowed)], ""


def _first(outputs: Any) -> np.ndarray:
    return np.asarray(outputs[0], np.float32)


def _report(found: list[Difference], one_sided: list[str], note: str) -> Report:
    wrong = [item for item in found if not item.good]
    lines = [
        f"{x.kind} of {x.what}: differs by {x.found:.1e}, allowed {x.allowed:.1e}" for x in wrong
    ]
    lines += [f"{name}: in only one of PEFT's model and the adapter's file" for name in one_sided]
    for kind in dict.fromkeys(item.kind for item in found):
        worst = max(
            (x for x in found if x.kind == kind), key=lambda x: (x.found != x.found, x.found)
        )
        lines.append(f"{kind}: largest difference {worst.found:.1e} of the largest, {worst.what}")
    lines += [note] if note else []
    good = not wrong and not one_sided
    lines.append("PEFT and randlora-jax agree" if good else "PEFT and randlora-jax do not agree")
    differences = [
        {**asdict(x), "found": x.found if isfinite(x.found) else None, "good": x.good}
        for x in found
    ]
    data = {"differences": differences, "one_sided": one_sided, "note": note}
    return Report("\n".join(lines), data, good)
