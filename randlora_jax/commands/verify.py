"""``randlora-jax verify``: whether PyTorch PEFT and this library read an adapter alike."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.flax_twin import FlaxTwin
from randlora_jax.commands.inputs import add_inputs, deltas_of, read_showing_progress
from randlora_jax.commands.peft_model import PeftTwin
from randlora_jax.commands.report import Commands, Misuse, Report, command_parser
from randlora_jax.commands.torch_model import NotCompared, open_model
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.flax_gaps import not_computed, unread_rope
from randlora_jax.interop.keys import trained_tensors
from randlora_jax.interop.numpy_delta import Deltas

DELTAS, LOGITS = 1e-5, 1e-5
TWINS = 1e-3  # base models that differ by more are not the same model

DESCRIPTION = f"""\
Open the adapter in DIR with PyTorch PEFT and with this library, and compare what they make of it:
delta_W of every layer; every tensor that was trained whole; and, where Hugging Face has a Flax
class for the model, logits. Needs PyTorch (pip install '.[torch,hf]' in a clone of randlora-jax).

  randlora-jax verify my-adapter --base my-model

Tolerances are relative to the largest number there: {DELTAS:g} for delta_W, none for tensors, for
logits {LOGITS:g} or twice what the base models differ by without an adapter. A strong adapter
raises every rounding: then twice what PEFT's own logits differ by with the adapter merged and
not, {TWINS:g} at most. Exit status 1 if anything is beyond them. Where the model's class is none of
transformers', has no Flax twin, or one that without an adapter computes something else, less is
compared, at least every delta_W. A note says why, and the last line what agrees; the exit status is
0 if that does, for it is of the adapter. (With --json, "logits_compared" is false.)

Nothing is fetched, and no code that comes with the base model is run."""


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
    # no connection for anything; read once, when transformers is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    return verify(
        args.dir,
        base=args.base,
        torch_generation=args.torch_generation,
        base_dtype=args.base_dtype,
    )


def verify(
    directory: str | Path,
    *,
    base: str | Path,
    torch_generation: str | None = None,
    base_dtype: str | None = None,
) -> Report:
    """Compare PEFT's reading of an adapter with ours; the report is good where they agree.

    Args:
      base: the base model's directory.
      torch_generation, base_dtype: as for `Deltas`.

    Raises:
      RandLoraError: we or PEFT cannot read the adapter, or it does not fit the base model.
      Misuse: PyTorch, transformers or PEFT cannot be imported.
    """
    _import_pytorch()
    adapter = read_showing_progress(directory)
    notes: list[str] = []
    twin = opened = None
    with BaseModel(base) as model:
        deltas = deltas_of(adapter, model, torch_generation, base_dtype)
        with _noting(notes):
            opened = open_model(model, adapter, deltas.layers)
            notes += [note] if (note := unread_rope(opened.config)) else []
            twin = FlaxTwin(opened)
        theirs = PeftTwin(directory, deltas, opened)
        found, one_sided = _compare_deltas(deltas, theirs)
    if theirs.bare:
        notes.append("layers compared with PEFT's on bare ones of the base model's shapes")
        notes += ["tensors trained whole not compared"] if adapter.saved else []
    else:
        whole, missing = _compare_whole(trained_tensors(adapter.saved), theirs)
        found, one_sided = found + whole, one_sided | missing
    if twin is not None and not theirs.bare:
        with _noting(notes):
            found.append(_compare_logits(twin, theirs, directory, deltas))
    return _report(found, sorted(one_sided), theirs.refused, notes)


def _import_pytorch() -> None:
    for name in ("torch", "transformers", "peft"):
        try:
            import_module(name)
        except ImportError as error:
            raise Misuse(
                f"verify compares with PyTorch PEFT, and {name} cannot be imported ({error}): "
                "pip install '.[torch,hf]' in a clone of randlora-jax"
            ) from error


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    try:
        yield
    except NotCompared as reason:
        notes.append(f"logits not compared: {reason}")


def difference(
    kind: str, what: str, ours: np.ndarray, theirs: np.ndarray, allowed: float
) -> Difference:
    """Compare two arrays; infinitely far where their shapes differ."""
    if ours.shape != theirs.shape:
        return Difference(kind, what, float("inf"), allowed)
    scale = float(np.abs(theirs).max()) or 1.0
    return Difference(kind, what, float(np.abs(ours - theirs).max()) / scale, allowed)


def _compare_deltas(deltas: Deltas, theirs: PeftTwin) -> tuple[list[Difference], set[str]]:
    """How far every delta_W is off; and the layers that only one side has."""
    layers = theirs.layers
    found = [
        difference("delta_W", name, deltas.of(name), theirs.delta(layers[name]), DELTAS)
        for name in deltas.layers
        if name in layers
    ]
    return found, layers.keys() ^ deltas.layers.keys()


def _compare_whole(
    whole: Mapping[str, np.ndarray], theirs: PeftTwin
) -> tuple[list[Difference], set[str]]:
    """How far tensors that were trained whole are off; and those that PEFT's model lacks."""
    tensors = theirs.saved(whole)
    found = [
        difference("trained tensors", key, whole[key].astype(np.float32), value, 0.0)
        for key, value in tensors.items()
    ]
    return found, whole.keys() - tensors.keys()


def _compare_logits(
    twin: FlaxTwin, theirs: PeftTwin, directory: str | Path, deltas: Deltas
) -> Difference:
    """How far logits of random tokens are off.

    Raises:
      NotCompared: they are without the adapter, or the Flax model does not take it.
    """
    before = difference("logits", "", twin.ours, twin.theirs, TWINS)
    if not before.good:
        raise NotCompared(
            f"without an adapter {twin.name} and PyTorch differ by {before.found:.1e} of the "
            f"largest, so they are not the same model{_because(theirs.model.config)}"
        )
    after, logits = twin.adapted(directory, deltas.draw), twin.logits_of(theirs.model)
    what = ("logits", "random tokens")
    strict = difference(*what, after, logits, max(LOGITS, 2 * before.found))
    if strict.good:
        return strict
    with theirs.merged() as merged:  # the same numbers, summed in another order
        rounding = difference(*what, twin.logits_of(merged), logits, 0)
    allowed = max(strict.allowed, min(2 * rounding.found, TWINS))
    return replace(strict, allowed=allowed)


def _because(config: Any) -> str:
    """What a Flax class is known to leave out, in brackets."""
    gaps = not_computed(config)
    return f" ({'; '.join(gaps)})" if gaps else ""


def _report(
    found: list[Difference], one_sided: list[str], refused: str, notes: list[str]
) -> Report:
    wrong = [item for item in found if not item.good]
    lines = [f"PEFT refuses the adapter {refused}"] if refused else []
    lines += [
        f"{x.kind} of {x.what}: differs by {x.found:.1e}, allowed {x.allowed:.1e}" for x in wrong
    ]
    lines += [f"{name}: in only one of PEFT's model and the adapter's file" for name in one_sided]
    kinds = list(dict.fromkeys(item.kind for item in found))
    lines += [_worst([x for x in found if x.kind == kind]) for kind in kinds]
    lines += notes
    good = not (wrong or one_sided or refused)
    lines.append(_verdict(kinds, good))
    differences = [
        {**asdict(x), "found": x.found if isfinite(x.found) else None, "good": x.good}
        for x in found
    ]
    data = {
        "differences": differences,
        "one_sided": one_sided,
        "refused": refused,
        "logits_compared": "logits" in kinds,
        "note": "; ".join(notes),
    }
    return Report("\n".join(lines), data, good)


def _worst(found: list[Difference]) -> str:
    """How far things of one kind are off, in words."""
    worst = max(found, key=lambda x: (x.found != x.found, x.found))
    if worst.found == 0:
        return f"{worst.kind}: equal, to the bit"
    where = f"most in {worst.what}, by {worst.found:.1e} of its largest number"
    return f"{worst.kind}: differs {where}; allowed {worst.allowed:.1e}"


def _verdict(kinds: list[str], good: bool) -> str:
    """The last line, which claims no more than was compared."""
    if not good:
        return "PEFT and randlora-jax do not agree"
    if "logits" in kinds:
        return "PEFT and randlora-jax agree"
    return f"{' and '.join(kinds)} agree{'s' * (len(kinds) == 1)}; logits were not compared"
