"""``randlora-jax to-lora``: the LoRA of a given rank that comes closest to an adapter."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.inputs import add_inputs, deltas_of, read_showing_progress
from randlora_jax.commands.low_rank import Choose, Factors, at_energy, factor, factor_leading
from randlora_jax.commands.output import Output, holds_a_model
from randlora_jax.commands.report import Commands, Report, command_parser, named, progress
from randlora_jax.interop.atomic import replacing_files
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.base_names import base_names
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.delta_factors import DeltaFactors, SharedB
from randlora_jax.interop.keys import PREFIX, file_key, trained_tensors
from randlora_jax.interop.numpy_delta import Deltas, too_strong
from randlora_jax.interop.peft_dir import WEIGHTS_NAME
from randlora_jax.interop.strict_json import dump_object, thaw, write_text
from randlora_jax.interop.targets import read_alike, write_targets
from randlora_jax.interop.tensor_writer import write_tensors

DESCRIPTION = """\
Write the adapter in DIR as a PEFT LoRA adapter, for programs that know no RandLoRA. A RandLoRA
update has full rank, so a LoRA of lower rank loses some of it. This takes each layer's best one and
says what share of the update's energy (squared Frobenius norm) it keeps.

  randlora-jax to-lora my-adapter --base my-model lora --rank 64
  randlora-jax to-lora my-adapter --base my-model lora --energy 0.99     as low as keeps 99 %
  randlora-jax to-lora my-adapter --base my-model lora --rank 64 --exact

Large layers are decomposed from random vectors, always the same, until more work would add next to
nothing: that keeps at least 99.9 % of what the best LoRA of that rank keeps. --exact decomposes
them whole, many times as long; so are layers whose rank is above an eighth of their smaller side.

Modules trained whole and biases are carried over. Factors are in float32, scaled so that each
layer's alpha equals its rank; the config's r is the largest rank."""


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "to-lora", "turn an adapter into LoRA", DESCRIPTION)
    add_inputs(parser)
    parser.add_argument("out", metavar="OUT", type=named, help="where to write, made if missing")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", metavar="R", type=_rank, help="of every layer that is as large")
    size.add_argument("--energy", metavar="SHARE", type=_share, help="to keep in every layer")
    parser.add_argument("--exact", action="store_true", help="the very best LoRA, which takes long")
    parser.add_argument("--force", action="store_true", help="replace an adapter in OUT")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Do what `DESCRIPTION` says."""
    return to_lora(
        args.dir,
        base=args.base,
        out=args.out,
        choose=partial(at_energy, args.energy) if args.rank is None else lambda shares: args.rank,
        exact=args.exact,
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
    exact: bool = False,
    torch_generation: str | None = None,
    base_dtype: str | None = None,
    force: bool = False,
) -> Report:
    """Write an adapter as a PEFT LoRA directory.

    Args:
      base: the base model's directory; only headers are read.
      choose: the rank of a layer, from the shares of its energy that ranks 1, 2, ... keep; what is
        beyond the layer's smaller side means all of it.
      exact: whether large layers are decomposed whole.
      torch_generation, base_dtype: as for `Deltas`.
      force: whether an adapter in `out` may be replaced.

    Raises:
      AdapterFileError: the adapter or the checkpoint is damaged, or delta_W is beyond float32.
      TargetError: the two do not fit.
      Misuse: `out` holds an adapter that may not be replaced, the source, or a model.
    """
    output = Output(out, force=force, refusal=partial(_refusal, Path(directory)))
    output.expect([CONFIG_NAME, WEIGHTS_NAME])
    with BaseModel(base) as model:
        deltas = deltas_of(read_showing_progress(directory), model, torch_generation, base_dtype)
        deltas.let_go()
        adapter = deltas.adapter
        found = factor_all(deltas, choose, exact=exact)
        conv1d = any(layer.conv1d for layer in deltas.layers.values())
        keys = [*base_names(model, adapter).tensors, *trained_tensors(adapter.saved)]
    ranks = {name: factors.rank for name, factors in found.items()}
    modules = {key.rpartition(".")[0] for key in keys}
    config = lora_config(_listing(adapter.config, ranks, modules), ranks, conv1d)
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


def _refusal(source: Path, folder: Path) -> str:
    """Why no LoRA of the adapter in `source` may be written to `folder`."""
    if folder.exists() and folder.samefile(source):
        return "holds the adapter itself, which cannot be made of its LoRA again"
    return holds_a_model(folder)


def factor_all(deltas: Deltas, choose: Choose, *, exact: bool) -> dict[str, Factors]:
    """Each layer's delta_W as a product of two thin matrices; arguments as for `to_lora`.

    Memory: the bases, two matrices of the size of the smaller side squared, and some blocks; where
    a layer is decomposed whole, its delta_W and two such matrices in float64 besides.

    Raises:
      AdapterFileError: a delta_W is beyond float32.
    """
    shared = SharedB(deltas)
    sizes = {name: 4 * prod(layer.shape) for name, layer in deltas.layers.items()}
    found: dict[str, Factors] = {}
    with progress("factoring", sum(sizes.values())) as advance:
        # in this order `shared` can add to what it has
        for name in sorted(sizes, key=lambda name: max(deltas.layers[name].shape)):
            delta = DeltaFactors(deltas, name, shared)
            factors = None if exact else factor_leading(delta, choose)
            if factors is None:
                factors = factor(delta.formed(), choose, delta.scale)
            if not factors.largest <= float(np.finfo(np.float32).max):
                raise too_strong(deltas.adapter, name)
            found[name] = factors.T if delta.transposed else factors
            advance(sizes[name])
    return {name: found[name] for name in deltas.layers}


def _listing(
    config: RandLoraConfig, layers: Iterable[str], modules: Iterable[str]
) -> RandLoraConfig:
    """`config` with a list for target_modules, if one takes just `layers`: SGLang reads no other.

    Args:
      modules: of the model.
    """
    config = read_alike(config, layers)
    if not isinstance(config.target_modules, str):
        return config
    found = write_targets(layers, modules)
    return config if isinstance(found, str) else replace(config, target_modules=found)


def lora_config(config: RandLoraConfig, ranks: dict[str, int], conv1d: bool) -> dict[str, Any]:
    """PEFT's LoraConfig, as JSON, for layers of these ranks, that adapts what `config` does."""
    largest = max(ranks.values())  # what servers that read only this must have room for
    # PEFT reads these keys as patterns that may begin after any dot
    others = {"^" + re.escape(name): r for name, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": thaw(config.auto_mapping),
        "revision": config.revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": config.randlora_dropout,
        "target_modules": thaw(read_alike(config, ranks).target_modules),
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
    if share < 1 - 1e-6:  # more than rounding
        kept += "; what is lost moves the logits, so compare what both say before you serve it"
    lines += [f"{out}: LoRA of {len(found)} layers, keeps {kept}", *output.lines()]
    layers = {name: {"rank": x.rank, "energy_kept": x.share} for name, x in found.items()}
    data = {"energy_kept": share, "layers": layers}
    return Report("\n".join(lines), data | output.data())


def _rank(text: str) -> int:
    rank = int(text) if text.isdecimal() else 0
    if rank < 1:
        raise argparse.ArgumentTypeError(f"expected a rank of at least 1, found {text}")
    return rank


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, found {text}")
    return share
