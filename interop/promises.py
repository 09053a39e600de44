"""What one part of an adapter's directory promises, another keeps.

A configuration names layers, modules that are trained whole, and biases; a file has tensors of
some; and which there are at all, only the base model tells. PEFT stops at a missing head, passes
over tensors of layers that its configuration does not name, and leaves at their start those it
finds no tensors of. Here each part is held against the others, both ways, by everything that reads
an adapter: `settled_config` when its two files are read, `check` once the base model is known, or
known not to be given.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import ALL_LINEAR, RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, listed, shown, warn
from randlora_jax.interop.keys import trained_tensors
from randlora_jax.interop.targets import (
    full_names,
    has_another_head,
    inside_saved,
    is_output_head,
    matches,
    matches_saved,
    naming_in_full,
    saved_modules,
    task_heads,
)

# A module named so in modules_to_save may be a head that a task does not know by that name.
_HEAD = re.compile(r"head|class|cls|score|logit|pred|proj|output|summary")


@dataclass(frozen=True)
class BaseNames:
    """What is known of a base model, by the names that the adapter's model has.

    Attributes:
      tensors: state-dict keys of weights and biases; where the model itself is at hand, of what the
        adapter's configuration trains whole.
      layers: linear layers; of a checkpoint of another class, those beside the adapted ones.
      is_whole: whether it is of the class that was trained, and so has all of its modules. Another
        checkpoint may lack a head, or have one that the adapter's class has not.
      doubtful: of a checkpoint's `tensors`, what the class that was trained may not have, since a
        file keeps what it was once saved with: BERT's, a head that no class of today reads. None
        where the model itself is at hand; a file also lacks a head that shares another's weight.
    """

    tensors: Collection[str]
    layers: Collection[str]
    is_whole: bool
    doubtful: Collection[str] | None = None


def settled_config(
    config: RandLoraConfig, layers: Collection[str], where: object
) -> RandLoraConfig:
    """The configuration that names all `layers` a file has tensors of.

    It is `config` itself, but where PEFT releases read layers_to_transform differently and an older
    reading alone fits the file: then it names the layers in full, and a warning says so.

    Raises:
      AdapterFileError: `config` does not name some of the layers, or names others in full.
    """
    if _needs_a_model(config):
        return config
    lost = set(full_names(config.target_modules)) - set(layers)
    if any("." in name for name in lost):  # a bare word may have been meant otherwise
        raise AdapterFileError(
            f"{where}: expected tensors of {listed(sorted(lost))}, which target_modules names in "
            "full, found none: the file lost them or is of another save; fetch both files again"
        )
    now, *older = _readings(config)
    strange = [name for name in layers if not matches(now, name)]
    if not strange:
        return config
    if any(all(matches(reading, name) for name in layers) for reading in older):
        return _as_trained(config, layers, where)
    raise AdapterFileError(
        f"{where}: has tensors of layers that {_settings(config)} does not name: "
        f"{listed(sorted(strange))}. PEFT would pass over them. The configuration was edited or is "
        "of another save: fetch both files again, or name these layers in target_modules"
    )


def check(adapter: Adapter, where: object, base: BaseNames | None) -> Adapter:
    """Hold an adapter that was read against its base model, or against itself if there is none.

    Modules trained whole must be there, with all their weights and biases; so must the layers that
    target_modules names. Biases are there all or, as PEFT before 0.21 wrote them, not at all, which
    a warning says.

    Args:
      where: names the adapter in messages.
      base: None if nothing is known of the base model; it then counts as having all that the
        configuration names, and a warning tells of names that nothing in the file goes by.

    Returns:
      the adapter; with another configuration where `settled_config` would give one.

    Raises:
      AdapterFileError: naming what is missing.
    """
    refuse_incomplete(adapter, where, base)
    asked, found, lost = _biases(adapter, base)
    if asked and not found:
        warn(
            f"{where}: bias={adapter.config.bias!r} says that biases were trained, and the file "
            "has none. PEFT before 0.21 did not save them: unless the model has no biases at all, "
            "what was trained is lost, and the base model's stay"
        )
    doubtful = (lost if found else set()) | _lost_of_modules(adapter, base)
    if _needs_a_model(adapter.config):
        _warn_of_doubtful(doubtful, where)
        return adapter
    if base is None:
        _warn_of_idle_targets(adapter, where)
        return adapter
    readings = [_selected(reading, base.layers) for reading in _readings(adapter.config)]
    missing = [sorted(selected - adapter.layers.keys()) for selected in readings]
    if missing[0] and not all(missing):
        return replace(adapter, config=_as_trained(adapter.config, adapter.layers, where))
    sure = [name for name in missing[0] if _sure({f"{name}.weight"}, base)]
    if sure:
        raise AdapterFileError(
            f"{where}: expected tensors of {listed(sure)}, which {_settings(adapter.config)} "
            "names in this model, found none. The file lost them, the configuration was edited, "
            "or it is another base model: fetch both files again, or name only the layers of the "
            "file in target_modules"
        )
    _warn_of_doubtful(doubtful.union(missing[0]), where)
    return adapter


def refuse_incomplete(adapter: Adapter, where: object, base: BaseNames | None) -> None:
    """Of `check`, what concerns modules trained whole and biases, without a warning.

    Raises:
      AdapterFileError: naming what is missing.
    """
    _check_modules(adapter, set(trained_tensors(adapter.saved)), where, base)
    _, found, lost = _biases(adapter, base)
    sure = _sure(lost, base)
    if found and sure:
        raise AdapterFileError(
            f"{where}: expected {listed(sorted(sure))}, since bias={adapter.config.bias!r} and "
            "biases of the same kind are there; found none. The file is incomplete: fetch it again"
        )


# Layers.


def _needs_a_model(config: RandLoraConfig) -> bool:
    """Whether only a model tells what target_modules names."""
    return config.target_modules in (None, ALL_LINEAR)


def _readings(config: RandLoraConfig) -> list[RandLoraConfig]:
    """`config` as PEFT reads it now, and as older releases did where that may be something else.

    Of the numbers in a name, layers_to_transform meant the last one up to 0.19, and means the first
    one from 0.20 on: ``layers.1.experts.0.w1`` was in layer 0 and is in layer 1. With all that is
    trained whole in modules_to_save, which keeps it from being adapted.
    """
    if task_heads(config.task_type):
        config = replace(config, modules_to_save=saved_modules(config))
    if isinstance(config.target_modules, str) or config.layers_to_transform in (None, ()):
        return [config]
    given = config.layers_pattern or r"[^.]*"
    patterns = (given,) if isinstance(given, str) else given
    last = tuple(rf".*\.{pattern}" for pattern in patterns)  # takes as much as it can
    return [config, replace(config, layers_pattern=last)]


def _as_trained(config: RandLoraConfig, layers: Iterable[str], where: object) -> RandLoraConfig:
    warn(
        f"{where}: layers_to_transform={shown(config.layers_to_transform)} fits the file's tensors "
        "only as PEFT up to 0.19 read it, by the last number in a layer's name. They are taken; "
        "PEFT 0.20 and later read the first one and would adapt others. `randlora-jax compact` "
        "writes the adapter so that every release reads it alike"
    )
    return naming_in_full(config, layers)


def _selected(config: RandLoraConfig, layers: Collection[str]) -> set[str]:
    whole = saved_modules(config)
    return {name for name in layers if matches(config, name) and not inside_saved(name, whole)}


def _warn_of_idle_targets(adapter: Adapter, where: object) -> None:
    """Warn of listed names that no layer of the file goes by: the file may have lost it."""
    targets = adapter.config.target_modules or ()
    if isinstance(targets, str):
        return
    names = [f".{name}" for name in adapter.layers]
    idle = [target for target in targets if not any(n.endswith(f".{target}") for n in names)]
    if idle:
        warn(
            f"{where}: target_modules names {listed(idle)}, and the file has no layer that is "
            "called so: either the base model has none, or its tensors are lost (--base tells)"
        )


def _warn_of_doubtful(names: Collection[str], where: object) -> None:
    """Warn of what a checkpoint has, the adapter's class may not have, and the file does not."""
    if names:
        warn(
            f"{where}: the base model's files have {listed(sorted(names))}, which the "
            "configuration names, and the adapter has nothing for it. That is right if the class "
            "that was adapted does not have it either, such as a head for pretraining; if it has, "
            "the adapter's file is incomplete: fetch it again"
        )


def _settings(config: RandLoraConfig) -> str:
    """What chooses the layers, for a message."""
    named = {
        name: getattr(config, name)
        for name in ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    }
    return ", ".join(f"{name}={shown(x)}" for name, x in named.items() if x not in (None, ()))


# Modules trained whole, and biases.


def _check_modules(
    adapter: Adapter, trained: set[str], where: object, base: BaseNames | None
) -> None:
    config = adapter.config
    for names in _promised_modules(config):
        if any(_root(key, names) for key in trained):
            continue
        if base is not None and base.is_whole:
            if not any(_root(key, names) for key in base.tensors) and not _may_be_tied(names, base):
                continue  # the model has no such module
        elif names == task_heads(config.task_type) and (
            _has_head_of_its_own(config, trained)
            or has_another_head(config.task_type, adapter.layers)
        ):
            continue
        raise AdapterFileError(
            f"{where}: expected tensors of {' or '.join(map(shown, names))}, found none: "
            f"task_type={config.task_type!r} and modules_to_save={shown(config.modules_to_save)} "
            "say that they are trained whole and saved. PEFT refuses such a file, too, if its "
            "model has such a module. Fetch the file again; if the model has none, remove the name "
            "from adapter_config.json"
        )
    sure = _sure(_lost_of_modules(adapter, base), base)
    if sure:
        raise AdapterFileError(
            f"{where}: expected {listed(sorted(sure))}, found other tensors of the modules "
            f"trained whole ({listed(saved_modules(config))}), but not these; PEFT refuses such a "
            "file, too. Either the file lost them, or it is another base model: fetch it again"
        )


def _may_be_tied(names: Iterable[str], base: BaseNames) -> bool:
    """Whether a module of these names may be there though a checkpoint has no tensor of it."""
    return base.doubtful is not None and any(map(is_output_head, names))


def _lost_of_modules(adapter: Adapter, base: BaseNames | None) -> set[str]:
    """What the file lacks of modules trained whole that it has begun, or has others like."""
    whole, trained = saved_modules(adapter.config), set(trained_tensors(adapter.saved))
    begun = {_root(key, whole) for key in trained}
    missing = {key for key in (base.tensors if base else ()) if _root(key, whole)} - trained
    return {key for key in missing if _root(key, whole) in begun} | _likely(missing, trained, base)


def _biases(adapter: Adapter, base: BaseNames | None) -> tuple[set[str], set[str], set[str]]:
    """Biases that ``bias`` asks for, those of its kind in the file, and what it seems to lack."""
    config, trained = adapter.config, trained_tensors(adapter.saved)
    if config.bias == "none":
        return set(), set(), set()
    whole = saved_modules(config)

    def is_promised(key: str) -> bool:
        module, _, leaf = key.rpartition(".")
        ours = config.bias == "all" or module in adapter.layers
        alone = f"{module}.weight" not in trained and not _root(key, whole)
        return leaf == "bias" and ours and alone

    found = set(filter(is_promised, trained))
    if base is None:
        asked = {f"{name}.bias" for name in adapter.layers}
        return asked, found, {key for key in asked - found if _is_alike(adapter, key, found)}
    asked = set(filter(is_promised, base.tensors))
    return asked, found, _likely(asked - found, found, base)


def _promised_modules(config: RandLoraConfig) -> Iterator[tuple[str, ...]]:
    """Of each, the file has tensors of at least one name."""
    heads = task_heads(config.task_type)
    if heads:  # a model has one of them
        yield heads
    yield from ((name,) for name in config.modules_to_save or () if name not in heads)


def _has_head_of_its_own(config: RandLoraConfig, trained: Iterable[str]) -> bool:
    """Whether modules_to_save names a head that a task's own names do not, such as BART's.

    PEFT writes a task's own names there: where they are not, the head may be called anything.
    """
    named, known = set(config.modules_to_save or ()), set(task_heads(config.task_type))
    heads = [x for x in named - known if not named & known or _HEAD.search(x.split(".")[-1])]
    return any(_root(key, heads) for key in trained)


def _likely(missing: set[str], found: Iterable[str], base: BaseNames | None) -> set[str]:
    """What of `missing` the adapter's model has, unless that is doubtful.

    Where another layer's tensor of that name is in the file, this one should be.
    """
    kinds = set(map(kind, found))
    return {key for key in missing if (base and base.is_whole) or kind(key) in kinds}


def _sure(missing: set[str], base: BaseNames | None) -> set[str]:
    """What of `missing` is not doubtful."""
    return missing.difference((base and base.doubtful) or ())


def _root(key: str, patterns: Collection[str]) -> str | None:
    """The outermost module around a tensor that is trained whole as one of `patterns`."""
    parts = key.split(".")[:-1]
    modules = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((name for name in modules if matches_saved(name, patterns)), None)


def kind(name: str) -> str:
    """A name less its numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _is_alike(adapter: Adapter, key: str, found: Iterable[str]) -> bool:
    """Whether the bias of a layer just like that of `key` is among `found`."""
    shapes = {name: gamma.shape for name, (_, gamma) in adapter.layers.items()}
    mine = key.removesuffix(".bias")
    others = (other.removesuffix(".bias") for other in found)
    return any(kind(other) == kind(mine) and shapes.get(other) == shapes[mine] for other in others)
