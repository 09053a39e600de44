"""``randlora-jax to-lora``: the LoRA of a given rank that comes closest to an adapter."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from randlora_jax.commands.inputs import add_inputs, deltas_of, read_showing_progress
from randlora_jax.commands.output import Output, holds_a_model
from randlora_jax.commands.report import Commands, Report, command_parser, named, progress
from randlora_jax.interop.atomic import replacing_files
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.keys import PREFIX, file_key, trained_tensors
from randlora_jax.interop.peft_dir import WEIGHTS_NAME
from randlora_jax.interop.strict_json import dump_object, thaw, write_text
from randlora_jax.interop.targets import by_full_names
from randlora_jax.interop.tensor_writer import write_tensors

DESCRIPTION = """\
Write the adapter in DIR as a PEFT LoRA adapter, for programs that know no RandLoRA. A RandLoRA
update has full rank, so a LoRA of lower rank loses some of it. This takes each layer's best one, by
singular value decomposition, and says what share of the update's energy (squared Frobenius norm)
it keeps.

  randlora-jax to-lora my-adapter --base my-model lora --rank 64
  randlora-jax to-lora my-adapter --base my-model lora --energy 0.99     as low as keeps 99 %

Modules trained whole and biases are carried over. Factors are in float32, scaled so that each
layer's alpha equals its rank."""


Choose: TypeAlias = Callable[[np.ndarray], int]


@dataclass(frozen=True)
class Factors:
    """One layer of a LoRA.

    Attributes:
      A: (r, in) float32.
      B: (out, r) float32; B @ A is what it adds to the weight.
      energy: squared Frobenius norm of the delta_W it stands for.
      kept: that of B @ A.
    """

    A: np.ndarray
    B: np.ndarray
    energy: float
    kept: float

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return len(self.A)

    @property
    def share(self) -> float:
        """Kept energy by energy; 1 where there was nothing to keep."""
        return self.kept / self.energy if self.energy else 1.0


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "to-lora", "turn an adapter into LoRA", DESCRIPTION)
    add_inputs(parser)
    parser.add_argument("out", metavar="OUT", type=named, help="where to write, made if missing")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", metavar="R", type=_rank, help="of every layer that is as large")
    size.add_argument("--energy", metavar="SHARE", type=_share, help="to keep in every layer")
    parser.add_argument("--force", action="store_true", help="replace an adapter in OUT")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Do what `DESCRIPTION` says."""
    return to_lora(
        args.dir,
        base=args.base,
        out=args.out,
        choose=partial(at_energy, args.energy) if args.rank is None else lambda shares: args.rank,
        torch_generation=args.torch_generation,
        base_dtype=args.base_dtype,
        force=args.force,
    )


def to_lora(
    directory: str | Path,
    *,
    base: str | Path,
    out: str | Path,
    choose: Choose,
    torch_generation: str | None = None,
    base_dtype: str | None = None,
    force: bool = False,
) -> Report:
    """Write an adapter as a PEFT LoRA directory.

    Args:
      base: the base model's directory; only headers are read.
      choose: the rank of a layer, from the shares of its energy that ranks 1, 2, ... keep; what is
        beyond the layer's smaller side means all of it.
      torch_generation, base_dtype: as for `Deltas`.
      force: whether an adapter in `out` may be replaced.

    Raises:
      AdapterFileError: the adapter or the checkpoint is damaged.
      TargetError: the two do not fit.
      Misuse: `out` holds an adapter that may not be replaced, or a model.
    """
    output = Output(out, force=force, refusal=holds_a_model)
    output.expect([CONFIG_NAME, WEIGHTS_NAME])
    adapter = read_showing_progress(directory)
    found: dict[str, Factors] = {}
    with BaseModel(base) as model:
        deltas = deltas_of(adapter, model, torch_generation, base_dtype)
        sizes = {name: 4 * prod(layer.shape) for name, layer in deltas.layers.items()}
        with progress("factoring", sum(sizes.values())) as advance:
            for name, nbytes in sizes.items():
                found[name] = factor(deltas.of(name), choose)
                advance(nbytes)
        conv1d = any(layer.conv1d for layer in deltas.layers.values())
    ranks = {name: factors.rank for name, factors in found.items()}
    config = lora_config(adapter.config, ranks, conv1d)
    config["base_model_name_or_path"] = adapter.config.base_model_name_or_path or str(base)
    arrays = {
        PREFIX + file_key(key, adapter.layers): value
        for key, value in trained_tensors(adapter.saved).items()
    }
    for name, factors in found.items():
        arrays[f"{PREFIX}{name}.lora_A.weight"] = factors.A
        arrays[f"{PREFIX}{name}.lora_B.weight"] = factors.B
    with replacing_files(out, entry=CONFIG_NAME, allow=output.allow) as staged:
        write_text(staged / CONFIG_NAME, dump_object(config))
        write_tensors(staged / WEIGHTS_NAME, arrays, {"format": "pt"})
    return _report(found, output)


def factor(delta: np.ndarray, choose: Choose) -> Factors:
    """The best approximation of `delta` (out, in) of the rank that `choose` chooses.

    Projects on the leading right singular vectors of M (max, min), the eigenvectors of M.T M. In
    float64 these are as good as float32 can use, and cost a third of a full decomposition of M.
    """
    is_wide = delta.shape[0] < delta.shape[1]
    M = (delta.T if is_wide else delta).astype(np.float64)
    vectors = np.linalg.eigh(M.T @ M)[1][:, ::-1]
    images = M @ vectors  # singular value times left singular vector
    energies = np.square(images).sum(0)
    total = float(energies.sum())
    cumulated = np.cumsum(energies)
    rank = min(choose(cumulated / total), len(energies)) if total else 1
    # both factors get the root of the singular value
    roots = energies[:rank] ** 0.25
    left = images[:, :rank] / np.where(roots > 0, roots, 1)
    right = (vectors[:, :rank] * roots).T
    B, A = (right.T, left.T) if is_wide else (left, right)
    A, B = (np.ascontiguousarray(x, dtype=np.float32) for x in (A, B))
    return Factors(A, B, energy=total, kept=float(cumulated[rank - 1]))


def at_energy(energy: float, shares: np.ndarray) -> int:
    """The smallest rank that keeps at least `energy`, from the shares that ranks 1, 2, ... keep."""
    return int(np.searchsorted(shares, energy)) + 1


def lora_config(config: RandLoraConfig, ranks: dict[str, int], conv1d: bool) -> dict[str, Any]:
    """PEFT's LoraConfig, as JSON, for layers of these ranks, that adapts what `config` does."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads these keys as patterns that may begin after any dot
    others = {"^" + re.escape(name): r for name, r in ranks.items() if r != common}
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": thaw(config.auto_mapping),
        "revision": config.revision,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": config.randlora_dropout,
        "target_modules": by_full_names(ranks),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": thaw(config.modules_to_save),
        "bias": config.bias.replace("randlora", "lora"),
        "fan_in_fan_out": conv1d,
        "init_lora_weights": True,
    }


def _report(found: dict[str, Factors], output: Output) -> Report:
    total = sum(factors.energy for factors in found.values())
    share = sum(factors.kept for factors in found.values()) / total if total else 1.0
    width = max(map(len, found))
    lines = [f"{'layer':{width}}  rank  energy kept"]
    lines += [f"{name:{width}}  {x.rank:4}  {x.share:.4%}" for name, x in found.items()]
    out, kept = output.folder, f"{share:.4%} of the energy of delta_W"
    lines += [f"{out}: LoRA of {len(found)} layers, keeps {kept}", *output.lines()]
    layers = {name: {"rank": x.rank, "energy_kept": x.share} for name, x in found.items()}
    data = {"energy_kept": share, "layers": layers}
    return Report("\n".join(lines), data | output.data())


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 1:
        raise argparse.ArgumentTypeError(f"expected a rank of at least 1, found {text}")
    return rank


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text}")
    return share
