"""``randlora-jax inspect``: what an adapter directory holds, what of it is waste, is it healthy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands import inspect_plot
from randlora_jax.commands.inputs import add_draw, deltas_of, keeping_promises
from randlora_jax.commands.inspect_text import in_words
from randlora_jax.commands.report import (
    Commands,
    Misuse,
    Report,
    adapter_directory,
    command_parser,
    model_directory,
    named,
    progress,
)
from randlora_jax.interop.adapter import Adapter, not_finite
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.draws import base_dtypes, generations
from randlora_jax.interop.keys import BASE_PARTS, Role, roles_of
from randlora_jax.interop.peft_dir import load_adapter, narrowest, open_adapter
from randlora_jax.interop.tensor_file import TensorFile
from randlora_jax.interop.written_modules import carried

DESCRIPTION = """\
Say what the adapter in DIR is: its layers, the bytes that matter and the bytes that are waste,
where its random bases come from, and whether its numbers are sound.

  randlora-jax inspect my-adapter
  randlora-jax inspect my-adapter --json | jq .bytes
  randlora-jax inspect my-adapter --base my-model             with the layers' full shapes
  randlora-jax inspect my-adapter --base my-model --plot norms.png
  randlora-jax inspect my-adapter --base my-model --plot q.png --layer 0.self_attn.q_proj

All of the file is read. NaN and infinity are reported here, where every other command refuses them;
anything else that is wrong with the files is an error here, too.

--plot draws how large the change of every layer is, and for some layers its singular values beside
those that a LoRA with as many numbers can have (needs matplotlib)."""


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "inspect", "say what an adapter is", DESCRIPTION)
    parser.add_argument("dir", metavar="DIR", type=adapter_directory, help="adapter directory")
    parser.add_argument(
        "--base",
        metavar="MODEL_DIR",
        type=model_directory,
        help="directory of the base model, in safetensors; only headers are read",
    )
    add_draw(parser)
    parser.add_argument("--plot", metavar="FILE", type=named, help="draw a .png, .pdf or .svg")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        action="append",
        help="a layer whose singular values to draw, by its name or the end of it; repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Inspect as the arguments say."""
    if args.layer and not args.plot:
        raise Misuse("--layer chooses what --plot draws; add --plot FILE")
    if args.plot and not args.base:
        raise Misuse("--plot needs the layers' shapes; give the base model with --base MODEL_DIR")
    if (args.torch_generation or args.base_dtype) and not args.base:
        raise Misuse(
            "--torch-generation and --base-dtype say how bases are drawn for a base model; give it "
            "with --base MODEL_DIR"
        )
    return inspect(
        args.dir,
        base=args.base,
        plot=args.plot,
        layers=args.layer or (),
        force=args.force,
        torch_generation=args.torch_generation,
        base_dtype=args.base_dtype,
    )


def inspect(
    directory: Path,
    *,
    base: Path | None = None,
    plot: Path | None = None,
    layers: Sequence[str] = (),
    force: bool = False,
    torch_generation: str | None = None,
    base_dtype: str | None = None,
) -> Report:
    """Look into an adapter directory; its report is not good if it holds NaN or infinity.

    Args:
      base: the base model's directory, for the layers' shapes.
      plot: where to draw norms and spectra; needs `base`.
      layers: whose spectra, by name or the end of it; by default those that change most.
      force: whether a file at `plot` may be replaced.
      torch_generation, base_dtype: as for `Deltas`.

    Raises:
      AdapterFileError: the files are damaged, for other reasons than NaN or infinity.
      TargetError: the adapter does not fit the base model.
      Misuse: a layer is not in the adapter, or there is a file at `plot` and `force` is not set.
    """
    if plot is not None:
        inspect_plot.check_place(plot, force=force)
    config, file = open_adapter(directory)
    with file, progress("reading", file.size) as file.advance:
        adapter = load_adapter(config, file)
    numbers = _numbers(adapter)
    good = not numbers["not_finite"]
    drawn: dict[str, Any] | None = None
    shapes = adapter.provenance.shapes if adapter.provenance else {}
    if base is None:
        keeping_promises(adapter, directory, None)
    else:
        with BaseModel(base) as model:
            shapes = {name: layer.shape for name, layer in model.layers(adapter).items()}
            if adapter.bases is not None or plot is not None:
                # checks the extents of the bases
                deltas = deltas_of(adapter, model, torch_generation, base_dtype)
            else:
                keeping_promises(adapter, directory, model)
        if plot is not None and good:
            drawn = inspect_plot.draw(deltas, plot, layers, force=force)
    data = {
        "directory": str(directory),
        "config": config.to_dict(),
        "bytes": _bytes(config, file, adapter),
        "layers": _layers(adapter, shapes),
        "saved": {key: list(array.shape) for key, array in adapter.saved.items()},
        "carried": sorted(carried(config, adapter.saved)),
        "bases": _bases(adapter, shapes),
        "numbers": numbers,
        "plot": drawn,
        "subfolders": sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}")),
    }
    return Report(in_words(data), data, good)


def _bytes(config: RandLoraConfig, file: TensorFile, adapter: Adapter) -> dict[str, int]:
    """What the file's bytes are spent on; `waste` is what `compact` saves."""
    roles = roles_of(file.tensors.values(), config, file.fail)
    frozen = {Role("saved", key) for key in carried(config, adapter.saved)}
    held = {
        key: tensor.nbytes
        for key, tensor in file.tensors.items()
        if roles[key].part not in (*BASE_PARTS, "repeated")
    }
    others = sum(nbytes for key, nbytes in held.items() if roles[key] in frozen)
    trained = sum(held.values()) - others
    once = sum(array.size * narrowest(array).itemsize for array in adapter.bases or ())
    header = min(tensor.start for tensor in file.tensors.values())
    return {
        "file": file.size,
        "trained": trained,
        "carried": others,
        "bases": once,
        "header": header,
        "waste": file.size - trained - others - once - header,
        "copies_of_bases": sum(role.part == "B" for role in roles.values()),
    }


def _layers(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """The layers, those together that are alike but for a number in their names."""
    kinds: dict[tuple[str, tuple[int, ...], tuple[int, int] | None], list[int]] = {}
    for name, (lam, gamma) in adapter.layers.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        key = (pattern, gamma.shape, shapes.get(name))
        kinds.setdefault(key, []).append(lam.size + gamma.size)
    return [
        {
            "name": pattern,
            "count": len(sizes),
            "shape": shape,
            "smaller_side": smallest,
            "bases": n,
            "trained": sum(sizes),
        }
        for (pattern, (n, smallest), shape), sizes in kinds.items()
    ]


def _bases(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Where the bases come from; for each torch generation, whether it draws them from the key."""
    config, recorded = adapter.config, adapter.provenance
    extents = None
    if shapes:
        low, high = sorted(max(sides) for sides in zip(*shapes.values(), strict=True))
        extents = low, high
    comparable = adapter.bases is not None or (recorded is not None and extents is not None)
    return {
        "in_file": adapter.bases is not None,
        "kind": config.kind,
        "key": config.projection_prng_key,
        "dtype": str(adapter.bases[1].dtype) if adapter.bases else None,
        "A": adapter.bases[0].shape if adapter.bases else None,
        "B": adapter.bases[1].shape if adapter.bases else None,
        "recorded": {"source": recorded.source, "key": recorded.projection_prng_key}
        if recorded
        else None,
        "torch": [
            {
                "generation": generation,
                "base_dtypes": list(map(str, base_dtypes(adapter, generation, extents))),
            }
            for generation in generations(config.kind)
        ]
        if comparable
        else None,
    }


def _numbers(adapter: Adapter) -> dict[str, Any]:
    """Whether the numbers are sound."""
    lams, gammas = zip(*adapter.layers.values(), strict=True)
    return {
        "not_finite": {key: bad for key, bad, _ in not_finite(adapter)},
        "largest_lambda": _largest(lams),
        "largest_gamma": _largest(gammas),
        "without_effect": [name for name, (lam, _) in adapter.layers.items() if not lam.any()],
    }


def _largest(arrays: Iterable[np.ndarray]) -> float:
    """The largest size of a number, NaN and infinity left out."""
    return max(float(np.abs(x).max(initial=0, where=np.isfinite(x))) for x in arrays)
