"""The life of an adapter: added, chosen, deleted, merged. Functions from registry to registry.

PEFT's names and meaning; what becomes of arrays is `adapter_arrays`' matter.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from randlora_jax.core.kept import Kept
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError, listed, shown
from randlora_jax.models.basis_source import KeptPairs
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec


def check_flag(argument: str, value: object) -> None:
    """Nothing, if an argument of a user's is True or False.

    Raises:
      ConfigError: it is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{argument}: expected True or False, found {shown(value)}")


def named(registry: AdapterRegistry, adapter_names: Any) -> tuple[str, ...]:
    """The adapters that a user names, one or several; each once.

    Raises:
      ConfigError: no such adapter.
    """
    try:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    except TypeError:
        names = [adapter_names]
    return tuple(dict.fromkeys(registry.spec(name).name for name in names))


def named_or_active(registry: AdapterRegistry, adapter_names: Any) -> tuple[str, ...]:
    """The adapters that a user names, one or several; None, or an empty list, for the active ones.

    Raises:
      ConfigError: no such adapter.
    """
    names = () if adapter_names is None else named(registry, adapter_names)
    return names or registry.active


def added(
    registry: AdapterRegistry,
    spec: AdapterSpec,
    config: RandLoraConfig,
    kept: KeptPairs,
    carried: frozenset[Path],
    *,
    trainable: bool,
) -> AdapterRegistry:
    """With one adapter more; a model's only one is active at once.

    Raises:
      ConfigError: the name is taken, adapters are merged, or the configuration contradicts another
        adapter's: PEFT has all adapters of a model share key and save_projection.
    """
    if spec.name in registry.specs or registry.combination(spec.name):
        raise ConfigError(
            f"an adapter named {spec.name!r} is already here; choose another name or delete it"
        )
    refuse_while_merged(registry, "add_adapter")
    for name, other in registry.configs.items():
        for key in ("projection_prng_key", "save_projection"):
            ours, theirs = getattr(config, key), getattr(other, key)
            if ours != theirs:
                raise ConfigError(
                    f"{key}={ours} differs from adapter {name!r}, which has {theirs}: all "
                    "adapters of one model must share it, as in PEFT"
                )
    return replace(
        registry,
        configs={**registry.configs, spec.name: config},
        specs={**registry.specs, spec.name: spec},
        kept_pairs={**registry.kept_pairs, **kept},
        carried={**registry.carried, spec.name: carried},
        numbers=_numbered(registry, spec.name),
        active=registry.active if registry.specs else (spec.name,),
        trained=registry.trained | ({spec.name} if trainable else set()),
    )


def _numbered(registry: AdapterRegistry, adapter_name: str) -> Mapping[str, int]:
    """The numbers of adapters that are or were here, one more among them; none changes."""
    known = registry.numbers
    if registry.stacks or adapter_name in known:
        return known
    return {**known, adapter_name: 1 + len(known)}


def chosen(
    registry: AdapterRegistry, adapter_names: Sequence[str], *, trainable: bool
) -> AdapterRegistry:
    """With just the named adapters applied and, if `trainable`, trained.

    Raises:
      ConfigError: adapters are merged.
    """
    refuse_while_merged(registry, "set_adapter")
    trained = frozenset(adapter_names) if trainable else frozenset()
    return replace(registry, active=tuple(adapter_names), trained=trained)


def disabled(registry: AdapterRegistry) -> AdapterRegistry:
    """With no adapter applied; what trains when it is active stays so."""
    return replace(registry, active=(), enabled=False)


def reenabled(registry: AdapterRegistry, before: AdapterRegistry) -> AdapterRegistry:
    """What `disabled` made of `before`, undone, but for what was chosen meanwhile, as in PEFT.

    Of the adapters that were active those that are still here; if none is, another takes over.
    """
    registry = replace(registry, enabled=before.enabled)
    if registry.active:
        return registry
    # of adapters that are off, which would train is no part of what a compiled function gives back
    new = registry.trained - before.specs.keys()
    registry = replace(registry, trained=before.trained & registry.specs.keys() | new)
    active = tuple(n for n in before.active if n in registry.specs or registry.combination(n))
    if active or not before.active:
        return replace(registry, active=active)
    return _taken_over(registry)


def switched(registry: AdapterRegistry, *, on: bool) -> AdapterRegistry:
    """With the active adapters applied, or none; which are active, and which train, stays so."""
    return replace(registry, enabled=on)


def deleted(registry: AdapterRegistry, adapter_name: str) -> AdapterRegistry:
    """Without an adapter; if it was the only active one, another takes over.

    Raises:
      ConfigError: no such adapter, adapters are merged, or rows or combinations have it.
    """
    if not registry.combination(adapter_name):
        registry.spec(adapter_name)
    refuse_while_merged(registry, "delete_adapter")
    registry = slots_without(registry, adapter_name)
    specs = {n: s for n, s in registry.specs.items() if n != adapter_name}
    in_use = {spec.identity for spec in specs.values()} | {s.identity for s in registry.stacks}
    left = replace(
        registry,
        configs={n: c for n, c in registry.configs.items() if n != adapter_name},
        specs=specs,
        active=tuple(n for n in registry.active if n != adapter_name),
        trained=registry.trained & set(specs),
        kept_pairs={i: pair for i, pair in registry.kept_pairs.items() if i in in_use},
        carried={n: paths for n, paths in registry.carried.items() if n != adapter_name},
    )
    return left if left.active or not registry.active else _taken_over(left)


def _taken_over(registry: AdapterRegistry) -> AdapterRegistry:
    """With the first adapter by name active, if there is any, and trained: PEFT's choice."""
    active = tuple(sorted(registry.specs)[:1])
    trained = registry.trained if registry.stacks else registry.trained | set(active)
    return replace(registry, active=active, trained=trained)


def slots_without(registry: AdapterRegistry, adapter_name: str) -> AdapterRegistry:
    """With the slot of an adapter, or of a combination, free, if it has one.

    Raises:
      ConfigError: a combination, or `set_rows`, still has it.
    """
    if users := registry.combining(adapter_name):
        raise ConfigError(f"adapter {adapter_name!r} is a part of {listed(users)}: delete it first")
    if adapter_name in registry.chosen:
        raise ConfigError(
            f"adapter {adapter_name!r} is what set_rows() gave some rows: set other ones first"
        )
    slots = {name: slot for name, slot in registry.slots.items() if name != adapter_name}
    return replace(registry, slots=slots)


def merged(
    registry: AdapterRegistry,
    adapter_names: Collection[str],
    originals: Mapping[Path, Kept],
) -> AdapterRegistry:
    """With the named adapters' deltas in the base kernels, whose `originals` are kept.

    Where one was kept at an earlier merge, it is of the kernel before any of them.
    """
    return replace(
        registry,
        merged=(*registry.merged, *adapter_names),
        originals={**registry.originals, **originals},
    )


def unmerged(registry: AdapterRegistry) -> AdapterRegistry:
    """With no delta in the base kernels."""
    return replace(registry, merged=(), originals={})


def refuse_while_merged(registry: AdapterRegistry, what: str) -> None:
    """Nothing, if no adapter is merged.

    Raises:
      ConfigError: one is, and `what` needs the base model as it was.
    """
    if registry.merged:
        raise ConfigError(
            f"{what}: {list(registry.merged)} are merged into the base; call unmerge_adapter() "
            "first"
        )


def refuse_while_off(registry: AdapterRegistry, what: str) -> None:
    """Nothing, if the active adapters are applied.

    Raises:
      ConfigError: they are off, and `what` would put them into the base model.
    """
    if not registry.enabled:
        raise ConfigError(f"{what}: the adapters are off; call enable_adapter_layers() first")


def refuse_while_stacked(registry: AdapterRegistry, what: str) -> None:
    """Nothing, if adapters are kept one by one.

    Raises:
      ConfigError: they lie in stacks, whose rows need the base model as it was.
    """
    if registry.stacks:
        raise ConfigError(
            f"{what}: the adapters lie in stacks, and rows of a batch need the base model as it "
            "was; merge_and_unload() gives a merged model without adapters"
        )


def scaled(registry: AdapterRegistry, adapter_name: str, scale: float) -> AdapterRegistry:
    """With another strength of an adapter, or of a combination.

    Raises:
      ConfigError: there is none of that name, or it is merged.
    """
    refuse_while_merged(registry, "set_scale")
    if slot := registry.combination(adapter_name):
        slots = {**registry.slots, adapter_name: replace(slot, scale=scale)}
        return replace(registry, slots=slots)
    spec = replace(registry.spec(adapter_name), scale=scale)
    return replace(registry, specs={**registry.specs, adapter_name: spec})
