"""``modules_to_save`` of a file in whose names modules are called otherwise than in the config."""

from __future__ import annotations

from collections.abc import Collection

from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.keys import is_of_adapted
from randlora_jax.interop.targets import inside_saved, saved_modules, task_heads


def written_modules(
    config: RandLoraConfig, saved: Collection[str], others: Collection[str]
) -> list[str]:
    """Names by which PEFT trains `saved` whole: those of `config` that still do, and new ones.

    PEFT cannot open a file of a module trained whole inside another one that is: so what is inside
    another is not named besides.

    Args:
      config: its modules_to_save, and its task that implies heads, may be in other names.
      saved: keys of what was trained whole, as `Adapter.saved` has them. Adapted layers need no
        name, nor do biases that `config.bias` asks for.
      others: modules that are not trained whole; a name of `config` that takes one is not kept,
        but for a task's own, which PEFT takes in any case.
    """
    found = {key.rpartition(".")[0] for key in saved if not is_of_adapted(key)}
    weights = {key.rpartition(".")[0] for key in saved if not key.endswith(".bias")}
    asked = found & weights if config.bias == "all" else found
    heads = task_heads(config.task_type)
    kept = [
        name
        for name in saved_modules(config)
        if name in heads
        or (any(inside_saved(module, [name]) for module in found) and not taken([name], others))
    ]
    new = {module for module in asked if not inside_saved(module, kept)}
    inner = {module for module in new if any(module.startswith(f"{outer}.") for outer in new)}
    return kept + sorted(new - inner)


def carried(config: RandLoraConfig, saved: Collection[str]) -> set[str]:
    """Of the keys of `Adapter.saved`, those of weights that nothing in `config` trains.

    PEFT writes an adapted output head's own, and embeddings of a resized vocabulary, of its own
    accord, and opens them frozen.
    """
    whole = saved_modules(config)

    def is_trained(key: str) -> bool:
        asked = config.bias == "all" or (config.bias == "randlora_only" and is_of_adapted(key))
        return (asked and key.endswith(".bias")) or inside_saved(key.rpartition(".")[0], whole)

    return {key for key in saved if not is_trained(key)}


def taken(names: Collection[str], modules: Collection[str]) -> list[str]:
    """Those of `modules` that PEFT trains whole as one of `names`, or inside one."""
    return sorted(module for module in modules if inside_saved(module, names))
