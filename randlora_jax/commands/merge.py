"""``randlora-jax merge``: W + delta_W, written as a model directory that needs no PEFT."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np

from randlora_jax.commands.inputs import add_inputs, deltas_of, read_showing_progress
from randlora_jax.commands.merge_plan import MergePlan, plan
from randlora_jax.commands.output import Output, are_weights, holds_an_adapter, is_like
from randlora_jax.commands.report import (
    Commands,
    Misuse,
    Report,
    command_parser,
    named,
    plain,
    progress,
    size,
)
from randlora_jax.interop.atomic import replacing_files
from randlora_jax.interop.base_model import MODEL_CONFIG, BaseModel
from randlora_jax.interop.errors import AdapterFileError, shown
from randlora_jax.interop.numpy_delta import BLOCK, Deltas
from randlora_jax.interop.progress import Advance
from randlora_jax.interop.strict_json import read_object
from randlora_jax.interop.tensor_file import pieces
from randlora_jax.interop.tensor_writer import Entry, Made, Stored, write_stream

DESCRIPTION = """\
Write the base model in MODEL_DIR with the adapter in DIR merged into its weights, as a Hugging Face
model directory: the same shards, index and other files, opened by transformers without PEFT.

  randlora-jax merge my-adapter --base my-model merged
  randlora-jax merge my-adapter --base my-model merged --force     over an earlier merge

Sums are formed in float32 and rounded once to the base model's dtype. Modules trained whole and
biases are merged too; a classifier that the base model lacks is added. Besides the adapter, some
rows of one tensor are in memory at a time. A merge into tied word embeddings is refused: it would
change both sides.

The base model's weights in other formats (.bin, .onnx, .gguf, ...) would be those without the
adapter, so they are left out; so are hidden files and folders."""

# What transformers loads a model from, which goes with an old model: nothing that begins alike.
_SHARD = f"-{'[0-9]' * 5}-of-{'[0-9]' * 5}"
_MODEL_FILES = [
    f"{stem}{part}"
    for stem, end in {
        "model": ".safetensors",
        "pytorch_model": ".bin",
        "tf_model": ".h5",
        "flax_model": ".msgpack",
    }.items()
    for part in (end, f"{_SHARD}{end}", f"{end}.index.json")
]
# The base model's weights besides those that are merged, and a trainer's state of them; in other
# programs' formats; and an adapter, which transformers would load on top. All but the first kind in
# subfolders, too, where that is part of a pipeline.
_OTHER_WEIGHTS = ("*.safetensors*", "pytorch_model*", "tf_model*", "flax_model*", "*.pt", "*.pth")
_ANYWHERE = (
    *("*.onnx*", "*.gguf", "openvino_*", "adapter_*", "ggml-*", "*.ot", "*.tflite"),
    *("weights.npz", "*.mlmodel", "*.nemo", "*.engine", "consolidated.*", "consolidated-*"),
)
# Meta's and OpenAI's own formats of their models, and what a trainer keeps, are among these.
_FOLDERS = ("coreml", "*.mlpackage", "*.mlmodelc", "original", "metal", "checkpoint-*")


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "merge", "merge an adapter into its base model", DESCRIPTION)
    add_inputs(parser)
    parser.add_argument("out", metavar="OUT", type=named, help="where to write, made if missing")
    parser.add_argument("--force", action="store_true", help="replace a model in OUT")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Do what `DESCRIPTION` says."""
    return merge(
        args.dir,
        base=args.base,
        out=args.out,
        torch_generation=args.torch_generation,
        base_dtype=args.base_dtype,
        force=args.force,
    )


def merge(
    directory: str | Path,
    *,
    base: str | Path,
    out: str | Path,
    torch_generation: str | None = None,
    base_dtype: str | None = None,
    force: bool = False,
) -> Report:
    """Write the base model in directory `base`, with an adapter merged into it, to `out`.

    Memory: what the adapter's layers use of its bases, its trained numbers, and A_flat and some
    blocks of `Deltas.adding`.

    Args:
      torch_generation, base_dtype: as for `Deltas`.
      force: whether a model in `out` may be replaced.

    Raises:
      AdapterFileError: the adapter or the checkpoint is damaged, or a sum is not finite.
      TargetError: the two do not fit, or the merged model would not compute what the adapter does.
      Misuse: `out` holds something that may not be replaced.
    """
    output = Output(out, force=force, refusal=holds_an_adapter)
    out = output.folder
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(base)):
        raise Misuse(f"{out} is the base model or inside it; name a directory of its own")
    old = [path.name for pattern in _MODEL_FILES for path in out.glob(pattern)]
    output.expect([MODEL_CONFIG, *old])
    with BaseModel(base) as model:
        deltas = deltas_of(read_showing_progress(directory), model, torch_generation, base_dtype)
        deltas.let_go()
        todo = plan(deltas, model)
        keep, leave = _other_files(model)
        output.expect(map(str, keep))
        total = sum(model.tensor(key).nbytes for key in model.home)
        with (
            replacing_files(
                out, entry=MODEL_CONFIG, obsolete=_MODEL_FILES, allow=output.allow
            ) as staged,
            progress("merging", total) as advance,
        ):
            for name in model.files:
                _write_file(name, staged, model, deltas, todo, advance)
            for path in keep:
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model.folder / path, staged / path)
            if todo.config:
                changed = read_object(staged / MODEL_CONFIG, finite=False) | todo.config
                (staged / MODEL_CONFIG).write_text(json.dumps(changed, indent=2) + "\n")
            if model.index is not None:
                (staged / model.index).write_text(_index(model, model.index, todo))
    report = _report(deltas, todo, out, total, leave)
    lines = [report.text, *output.lines()]
    return Report("\n".join(lines), {"base": str(base), **report.data, **output.data()})


def _write_file(
    name: str, staged: Path, base: BaseModel, deltas: Deltas, todo: MergePlan, advance: Advance
) -> None:
    """One safetensors file: the tensors of the base model's, and in the last what is added."""
    source = base.files[name]
    entries, old_key = {}, {}
    for key, tensor in source.tensors.items():
        new = todo.renamed.get(key, key)
        old_key[new] = key
        entries[new] = Entry(tensor.code, tensor.shape)
    if name == list(base.files)[-1]:
        code = next(iter(deltas.layers.values())).tensor.code
        entries |= {key: Entry(code, value.shape) for key, value in todo.added.items()}
        entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))

    def make(new: str) -> Made:
        key = old_key.get(new, new)
        value = todo.added.get(new, todo.replaced.get(key))
        if value is None and key not in todo.sums:
            return Stored(source, source.tensors[key])
        if value is None:
            return _summed(base, key, todo.sums[key], deltas)
        with np.errstate(over="ignore"):
            weight = value.astype(entries[new].dtype)
        for name in todo.sums.get(key, ()):
            deltas.add_to(name, weight)
        _check_finite(weight, base.folder, key)
        return weight

    write_stream(staged / name, entries, source.metadata, make, advance)


def _summed(base: BaseModel, key: str, names: list[str], deltas: Deltas) -> Iterator[np.ndarray]:
    """A tensor with the delta_W of all layers in it added, some rows at a time."""
    *sides, width = base.tensor(key).shape
    tensor, file = replace(base.tensor(key), shape=(prod(sides), width)), base.files[base.home[key]]
    parts = {name: deltas.layers[name].stored for name in names}
    ends = {end for part in parts.values() for end in (part.row, part.row + part.shape[0])}
    step = max(1, BLOCK * prod(sides) // tensor.nbytes)
    for first, last in pairwise(sorted({0, *ends, prod(sides)})):
        adding = [
            (part.column, part.column + part.shape[1], deltas.adding(name))
            for name, part in parts.items()
            if part.row <= first < part.row + part.shape[0]
        ]
        for start in range(first, last, step):
            rows = file.rows(tensor, start, min(start + step, last))
            for left, right, add in adding:
                add(rows[:, left:right], start - first)
            _check_finite(rows, base.folder, key)
            yield rows
            del rows  # or it lies beside the next


def _check_finite(weight: np.ndarray, where: Path, key: str) -> None:
    """Refuse a merged weight, or rows of it, that holds NaN or infinity."""
    wide = np.promote_types(weight.dtype, np.float32)  # several times as fast as asking bfloat16
    bad = sum(
        piece.size - np.count_nonzero(np.isfinite(piece.astype(wide, copy=False)))
        for piece in pieces(weight)
    )
    if bad:
        raise AdapterFileError(
            f"{where}: {shown(key)}: merged, {bad} of {weight.size} numbers are NaN, infinite or "
            f"beyond {weight.dtype}. The adapter is too strong for it, or the base model damaged"
        )


def _index(base: BaseModel, old: str, todo: MergePlan) -> str:
    index = read_object(base.folder / old)
    places = {todo.renamed.get(key, key): name for key, name in base.home.items()}
    last = list(base.files)[-1]
    index["weight_map"] = dict(sorted({**places, **dict.fromkeys(todo.added, last)}.items()))
    metadata = index.get("metadata")
    kind = base.tensor(next(iter(todo.sums))).dtype
    more = sum(value.size for value in todo.added.values())
    for name, size_of_one in (("total_size", kind.itemsize), ("total_parameters", 1)):
        if isinstance(metadata, dict) and isinstance(metadata.get(name), int):
            metadata[name] += more * size_of_one
    return json.dumps(index, indent=2) + "\n"


def _other_files(base: BaseModel) -> tuple[list[Path], list[Path]]:
    """The base model's other files, hidden ones apart: to be kept, and to be left out."""
    keep: list[Path] = []
    leave: list[Path] = []
    for path in _walk(base.folder):
        name = path.name
        if str(path) in (*base.files, base.index):
            continue
        other = is_like(name, _ANYWHERE) or any(is_like(x, _FOLDERS) for x in path.parts[:-1])
        if path.parent == Path("."):
            other = other or are_weights(name) or is_like(name, _OTHER_WEIGHTS)
        (leave if other else keep).append(path)
    return keep, leave


def _walk(folder: Path) -> Iterator[Path]:
    """Its files, hidden ones apart; in linked folders, too, each once."""
    met = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in met:
            folders.clear()
            continue
        met.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name).relative_to(folder)


def _report(deltas: Deltas, todo: MergePlan, out: Path, total: int, leave: list[Path]) -> Report:
    dtypes = sorted({str(layer.tensor.dtype) for layer in deltas.layers.values()})
    count, kinds = len(deltas.layers), " and ".join(dtypes)
    lines = [f"{out}: {count} layers merged, {size(total)}, stored in {kinds}"]
    if todo.replaced:
        lines.append(f"replaced whole: {', '.join(map(plain, sorted(todo.replaced)))}")
    if todo.added:
        lines.append(f"trained whole, added: {', '.join(map(plain, sorted(todo.added)))}")
    if todo.renamed:
        lines.append("every name has the prefix now, as a model with a head needs it")
    for name, value in todo.config.items():
        lines.append(f"{MODEL_CONFIG}: {name} is now {json.dumps(value)}")
    if leave:
        lines.append(f"left out, as they lack the adapter: {', '.join(map(str, leave))}")
    data = {
        "layers": sorted(deltas.layers),
        "replaced": sorted(todo.replaced),
        "added": sorted(todo.added),
        "config": todo.config,
        "left_out": [str(path) for path in leave],
        "bytes": total,
    }
    return Report("\n".join(lines), data)
