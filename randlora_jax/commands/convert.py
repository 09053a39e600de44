"""``randlora-jax convert``: other layer names, and bases where there were none."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from randlora_jax.commands.inputs import (
    add_draw,
    deltas_of,
    keeping_promises,
    read_showing_progress,
)
from randlora_jax.commands.output import Output, holds_a_model
from randlora_jax.commands.report import (
    Commands,
    Misuse,
    Report,
    adapter_directory,
    command_parser,
    model_directory,
    named,
)
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.config import CONFIG_NAME
from randlora_jax.interop.errors import AdapterFileError, ConfigError, listed, shown
from randlora_jax.interop.expressions import fault
from randlora_jax.interop.keys import file_key, is_path, trained_tensors
from randlora_jax.interop.missing_bases import DrawnPair, refuse_in_vain
from randlora_jax.interop.peft_dir import WEIGHTS_NAME, write_adapter
from randlora_jax.interop.promises import refuse_incomplete
from randlora_jax.interop.strict_json import read_object
from randlora_jax.interop.targets import (
    inside_saved,
    naming_in_full,
    read_alike,
    saved_modules,
    task_heads,
)
from randlora_jax.interop.written_modules import taken, written_modules

DESCRIPTION = """\
Rename the layers of the adapter in SRC and make it whole, and write it to DST. What it computes
stays the same.

  randlora-jax convert theirs ours --to jax --base my-model
      an adapter saved without its bases (save_projection=False) gets them, so that nobody has to
      guess how they were drawn; --torch-generation and --base-dtype say it where the file
      does not
  randlora-jax convert ours theirs --to torch --names rules.json
      layers named as in a JAX model get the names of the PyTorch one
  randlora-jax convert theirs ours --to jax --names rules.json
      the same rules, the other way

rules.json has the rules of get_peft_model(names=...): regular expressions on JAX paths, with the
PyTorch names they become: {"layers/(\\\\d+)/attn/q": "model.layers.\\\\1.self_attn.q_proj"}.
To be read backwards, an expression must be plain text and groups."""


def add_parser(commands: Commands) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = command_parser(commands, "convert", "rename layers, add missing bases", DESCRIPTION)
    parser.add_argument("src", metavar="SRC", type=adapter_directory, help="adapter directory")
    parser.add_argument("dst", metavar="DST", type=named, help="where to write, made if missing")
    parser.add_argument("--to", required=True, choices=["jax", "torch"], help="whose names to give")
    parser.add_argument("--names", metavar="FILE", type=named, help="rules for the names, in JSON")
    parser.add_argument(
        "--base",
        metavar="MODEL_DIR",
        type=model_directory,
        help="directory of the base model: needed to draw bases that SRC lacks; else it tells "
        "whether SRC is whole",
    )
    add_draw(parser)
    parser.add_argument("--force", action="store_true", help="replace an adapter in DST")
    return parser


def run(args: argparse.Namespace) -> Report:
    """Convert as the arguments say."""
    output = Output(args.dst, force=args.force, refusal=holds_a_model)
    output.expect([CONFIG_NAME, WEIGHTS_NAME])
    adapter, notes = read_showing_progress(args.src), []
    drawn = {"generation": args.torch_generation, "base_dtype": args.base_dtype}
    try:
        refuse_in_vain(adapter, **drawn)
    except ConfigError as error:
        raise Misuse(str(error)) from error
    if adapter.bases is None:
        adapter = with_bases(adapter, args.src, args.base, **drawn)
        assert adapter.provenance is not None
        notes.append(f"bases drawn as {adapter.provenance.source} and written")
    elif args.base is None:
        adapter = keeping_promises(adapter, args.src, None)
    else:
        with BaseModel(args.base) as model:
            adapter = keeping_promises(adapter, args.src, model)
    if args.names:
        rules = read_rules(args.names)
        renamed = rename(adapter, rules if args.to == "torch" else backwards(rules))
        changed = len(set(renamed.layers) - set(adapter.layers))
        notes.append(f"{changed} of {len(adapter.layers)} layers renamed")
        adapter = renamed
    if not notes:
        raise Misuse(
            f"{args.src} has its bases and no --names are given: nothing to convert. "
            "randlora-jax compact writes it smaller"
        )
    refuse_incomplete(adapter, f"{args.dst}, as it would be written", None)
    write_adapter(args.dst, adapter, allow=output.allow)
    lines = [f"{args.src} -> {args.dst}", *notes, *output.lines()]
    data = {"layers": sorted(adapter.layers), "notes": notes}
    return Report("\n".join(lines), data | output.data())


def with_bases(
    adapter: Adapter,
    where: Path,
    base: Path | None,
    generation: str | None = None,
    base_dtype: str | None = None,
) -> Adapter:
    """The adapter with the bases that PyTorch draws from its key.

    Raises:
      Misuse: the base model, which alone tells the extents, is not given.
      AdapterFileError: the draw is not the one that was recorded.
    """
    if base is None:
        raise Misuse(f"{where} has no bases; to draw them, give the base model's directory: --base")
    with BaseModel(base) as model:
        deltas = deltas_of(adapter, model, generation, base_dtype)
        shapes = {name: layer.shape for name, layer in deltas.layers.items()}
    assert deltas.draw is not None
    drawn = DrawnPair(deltas.bases, deltas.draw)
    provenance = drawn.provenance(adapter.config.projection_prng_key, shapes)
    config = read_alike(replace(adapter.config, save_projection=True), adapter.layers)
    return replace(adapter, config=config, bases=deltas.bases, provenance=provenance)


def read_rules(path: Path) -> dict[str, str]:
    """The rules in a file.

    Raises:
      Misuse: it holds no JSON object; an expression is none, or its name is none or refers to
        groups that it has not.
    """
    try:
        rules = read_object(path)
    except AdapterFileError as error:
        raise Misuse(str(error)) from error
    for expression, name in rules.items():
        if not isinstance(name, str):
            raise Misuse(
                f"{path}: {shown(expression)}: expected the PyTorch name of what the expression "
                f"matches, found {shown(name)}"
            )
        if wrong := fault(expression) or fault(expression, name):
            raise Misuse(
                f"{path}: {shown(expression)}: {shown(name)} is no rule ({wrong}): expected a "
                "regular expression, and a name that refers to groups of it"
            )
    return rules


def rename(adapter: Adapter, rules: Mapping[str, str]) -> Adapter:
    """The adapter with its layers, and other modules it trains, named by `rules`.

    Raises:
      AdapterFileError: two would have one name.
      Misuse: no rule fits any name, or one gives a name that no reader opens.
    """
    trained = trained_tensors(adapter.saved)
    modules = {*adapter.layers, *map(_module, trained)}
    names = {module: _renamed(module, rules) for module in modules}
    if not any(new != old for old, new in names.items()):
        raise Misuse(f"no rule fits a name of this adapter, such as {min(modules)!r}")
    if len(set(names.values())) < len(names):
        raise AdapterFileError("these rules give two modules one name")
    layers = {names[name]: arrays for name, arrays in adapter.layers.items()}
    keys = {
        key: file_key(names[_module(key)] + key[len(_module(key)) :], layers) for key in trained
    }
    config = replace(adapter.config, modules_to_save=_whole(adapter, names, keys) or None)
    config = naming_in_full(config, layers)
    recorded = adapter.provenance
    if recorded is not None:
        shapes = {names[name]: shape for name, shape in recorded.shapes.items()}
        recorded = replace(recorded, shapes=shapes)
    saved = {keys[key]: x for key, x in trained.items()}
    return replace(adapter, config=config, layers=layers, saved=saved, provenance=recorded)


def _whole(adapter: Adapter, names: Mapping[str, str], keys: Mapping[str, str]) -> list[str]:
    """``modules_to_save`` in new `names`, of modules, where `keys` has those of the file's tensors.

    The embeddings that PEFT writes of its own accord are named by it neither before nor after.

    Raises:
      Misuse: PEFT would train more.
    """
    config, heads = adapter.config, task_heads(adapter.config.task_type)
    before = {module for module in names if inside_saved(module, saved_modules(config))}
    before -= adapter.layers.keys()
    others = {names[module] for module in names.keys() - before}
    keys_of_whole = [key for old, key in keys.items() if _module(old) in before]
    found = written_modules(config, keys_of_whole, others)
    if more := taken(found, others):
        raise Misuse(
            f"by these rules {listed(found)} are trained whole (modules_to_save, and "
            f"task_type={config.task_type!r}), and PEFT would train {listed(more)} so, too, since "
            "it takes every module whose path ends so: give other names"
        )
    if taken(heads, before) and not taken(heads, [names[module] for module in before]):
        return [name for name in found if name not in heads]  # the head is called otherwise now
    return found


def backwards(rules: Mapping[str, str]) -> dict[str, str]:
    """Rules from PyTorch names to JAX paths, from ones the other way.

    Raises:
      Misuse: an expression has more than plain text and groups, or two have one name.
    """
    turned: dict[str, str] = {}
    for pattern, name in rules.items():
        groups = re.findall(r"\([^()]*\)", pattern)
        plain = re.sub(r"\([^()]*\)", "", pattern)
        used = re.findall(r"\\(\d)", name)
        if re.search(r"[][().*+?{}|^$\\]", plain) or used != [
            str(i + 1) for i in range(len(groups))
        ]:
            raise Misuse(
                f"{pattern!r}: to be read backwards, an expression must be plain text and groups, "
                "all of which its name uses, in order"
            )
        pieces = re.split(r"\\\d", name)
        expression = re.escape(pieces[0])
        for group, piece in zip(groups, pieces[1:], strict=True):
            expression += group + re.escape(piece)
        path = pattern
        for number in range(1, len(groups) + 1):
            path = re.sub(r"\([^()]*\)", rf"\\{number}", path, count=1)
        if wrong := fault(expression, path):
            raise Misuse(f"{pattern!r}: {name!r} cannot be read backwards ({wrong})")
        if expression in turned:
            raise Misuse(f"two rules give the name {name!r}, so it cannot be read backwards")
        turned[expression] = path
    return turned


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    """By the first rule that fits `name` whole; paths are written with slashes in rules."""
    for pattern, new in rules.items():
        for written in (name, name.replace(".", "/")):
            match = re.fullmatch(pattern, written)
            if match:
                found = match.expand(new).replace("/", ".")
                if not is_path(found) or "{" in found:  # the braces of stacks, which files have not
                    raise Misuse(
                        f"the rule {pattern!r}: {new!r} calls {name!r} {found!r}, which no reader "
                        "opens: expected printable parts joined by single dots, none of them with "
                        "'randlora_' or braces in it"
                    )
                return found
    return name


def _module(key: str) -> str:
    return key.rpartition(".")[0]
