"""``randlora-jax compact``: an adapter directory with one copy of its bases, or with none."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.inputs import keeping_promises
from randlora_jax.commands.output import Output, holds_a_model
from randlora_jax.commands.report import (
    Commands,
    Report,
    adapter_directory,
    command_parser,
    named,
    progress,
    size,
)
from randlora_jax.interop.adapter import Adapter, check_finite
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.draws import agreeing_dtypes, in_words
from randlora_jax.interop.errors import AdapterFileError, listed, shown
from randlora_jax.interop.keys import LAYER_PARTS, roles_of
from randlora_jax.interop.missing_bases import DrawnPair
from randlora_jax.interop.peft_dir import WEIGHTS_NAME, load_once, open_adapter, write_adapter
from randlora_jax.interop.targets import read_alike
from randlora_jax.interop.tensor_file import TensorFile
from randlora_jax.interop.torch_rng import Generation, identify, word_bytes

DESCRIPTION = """\
Write the adapter in SRC to DST with one copy of its random bases. PEFT up to 0.21.2 writes one
under every layer; all of them are read and compared, and copies that differ are refused. PEFT
(0.16 and later) and transformers open the result like the original; PEFT warns of missing adapter
keys (randlora_A, randlora_B), which is harmless. Only the adapter's two files are written: PEFT's
README.md and other files are not copied.

  randlora-jax compact my-adapter small                one copy
  randlora-jax compact my-adapter my-adapter --force   in place, in one instant
  randlora-jax compact my-adapter tiny --drop-bases    none, if PyTorch can draw them again

Bases in float32 are written in bfloat16 if that loses nothing; what releases of PEFT read
differently in target_modules becomes the layers' names in full. With --drop-bases they are drawn
from the adapter's key as every known release of torch does it and compared bit for bit; if none
draws them, nothing is written. Such a file is right only as a model's first adapter, and only under
the torch generation and base model dtype that the report names."""

FIRST_ONLY = (
    "right only as a model's first adapter: opened as a second one, it gets the bases of the first"
)


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "compact", "write an adapter with bases once", DESCRIPTION)
    parser.add_argument("src", metavar="SRC", type=adapter_directory, help="adapter directory")
    parser.add_argument("dst", metavar="DST", type=named, help="where to write, made if missing")
    parser.add_argument(
        "--drop-bases", action="store_true", help="write none, if PyTorch can draw them again"
    )
    parser.add_argument("--force", action="store_true", help="replace an adapter in DST")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Compact as the arguments say."""
    return compact(args.src, args.dst, drop_bases=args.drop_bases, force=args.force)


def compact(src: Path, dst: Path, *, drop_bases: bool = False, force: bool = False) -> Report:
    """Write the adapter in `src` to `dst` with one copy of its bases, or none.

    Memory: one copy of the bases and the trained numbers; to drop the bases, a draw of them too.

    Raises:
      AdapterFileError: `src` holds no sound adapter, or `drop_bases` and no known torch release
        draws its bases.
      Misuse: `dst` holds an adapter and `force` is not set, or a model.
    """
    output = Output(dst, force=force, refusal=holds_a_model)
    output.expect([CONFIG_NAME, WEIGHTS_NAME])
    config, file = open_adapter(src)
    with file, progress("comparing copies", file.size) as file.advance:
        before = _content(config, file)
        notes = [*_widened(config, file), *_others(src)]
        adapter, compare_copies = load_once(config, file)
        adapter = keeping_promises(adapter, src, None)
        adapter = replace(adapter, config=read_alike(adapter.config, adapter.layers))
        with ThreadPoolExecutor(1) as beside, closing(file):  # which ends comparing, if need be
            comparison = beside.submit(compare_copies)  # nearly all of the time
            check_finite(adapter, file.path)
            drawn: dict[str, Any] | None = None
            if drop_bases and adapter.bases is not None:
                key = adapter.config.projection_prng_key
                adapter, generation, dtypes = without_bases(adapter, src)
                drawn = {
                    "key": key,
                    "generation": generation,
                    "base_dtypes": list(map(str, dtypes)),
                }
                notes = [f"drawn again from key {key} by {in_words(generation, dtypes)}", *notes]
                notes.insert(1, FIRST_ONLY)
            write_adapter(dst, adapter, confirm=comparison.result, allow=output.allow)
    config, file = open_adapter(dst)
    with file:
        after = _content(config, file)
    lines = [f"{src}: {_in_words(before)}", f"{dst}: {_in_words(after)}", *notes, *output.lines()]
    data = {"before": before, "after": after, "drawn_by_torch": drawn, "notes": notes}
    return Report("\n".join(lines), data | output.data())


def without_bases(
    adapter: Adapter, where: Path
) -> tuple[Adapter, Generation | None, list[np.dtype]]:
    """The adapter less its bases but with their digest, and how PyTorch draws them again.

    Returns:
      the adapter, the generation (None for sparse bases: any) and the base models' dtypes.

    Raises:
      AdapterFileError: no known torch release draws these bases from the adapter's key.
    """
    assert adapter.bases is not None
    config, recorded = adapter.config, adapter.provenance
    key = config.projection_prng_key
    a, b = adapter.bases
    with progress("drawing PyTorch's bases", word_bytes(len(a), a.shape[2], len(b))) as advance:
        draw = identify(a, b, key, advance)
    if draw is None or draw.kind != config.kind:
        source = f"; they are recorded as {shown(recorded.source)}" if recorded else ""
        raise AdapterFileError(
            f"{where}: expected the {config.kind} bases that PyTorch draws from key {key}, found "
            f"others{source}. Without them the adapter would be another: compact it without "
            "--drop-bases"
        )
    shapes = recorded.shapes if recorded else {}
    provenance = DrawnPair(adapter.bases, draw).provenance(key, shapes)
    config = replace(config, save_projection=False, projection_source="torch")
    dropped = replace(adapter, config=config, bases=None, provenance=provenance)
    return dropped, draw.generation, agreeing_dtypes(draw, adapter.bases)


def _content(config: RandLoraConfig, file: TensorFile) -> dict[str, Any]:
    roles = roles_of(file.tensors.values(), config, file.fail)
    bases = [tensor for tensor in file.tensors.values() if roles[tensor.key].part == "B"]
    dtype = str(bases[0].dtype) if bases else None
    return {"bytes": file.size, "copies_of_bases": len(bases), "bases_dtype": dtype}


def _in_words(content: dict[str, Any]) -> str:
    copies = content["copies_of_bases"]
    bases = {0: "no bases", 1: "the bases once"}.get(copies, f"the bases {copies} times")
    return f"{size(content['bytes'])}, {bases}" + (
        f" in {content['bases_dtype']}" if copies else ""
    )


def _widened(config: RandLoraConfig, file: TensorFile) -> list[str]:
    roles = roles_of(file.tensors.values(), config, file.fail)
    dtypes = {
        str(tensor.dtype) for key, tensor in file.tensors.items() if roles[key].part in LAYER_PARTS
    } - {"float32"}
    return [f"lambda and gamma are widened from {' and '.join(sorted(dtypes))}"] if dtypes else []


def _others(src: Path) -> list[str]:
    inside = sorted(path.parent.name for path in src.glob(f"*/{CONFIG_NAME}"))
    return [f"not included are the adapters in {listed(inside)}"] if inside else []
