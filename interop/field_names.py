"""A field that a configuration does not have is refused, and the right one is named."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import fields
from typing import Any, TypeVar

from randlora_jax.interop.errors import ConfigError, nearest, shown

# What other libraries, and PEFT's other methods, call our fields.
_SAME_ELSEWHERE = {
    "r": ("rank", "lora_r", "lora_rank", "randlora_r", "randlora_rank", "dim", "network_dim"),
    "randlora_alpha": ("alpha", "lora_alpha", "network_alpha", "vera_alpha"),
    "randlora_dropout": ("dropout", "dropout_rate", "lora_dropout", "vera_dropout"),
    "target_modules": ("targets", "target", "modules", "module_path", "layers", "target_layers"),
    "projection_prng_key": ("seed", "key", "prng_key", "rng", "rngs", "random_seed"),
    "init_weights": ("init_lora_weights", "init_randlora_weights"),
    "modules_to_save": ("save_modules", "trainable_modules", "modules_to_train"),
    "layers_to_transform": ("layer_indices", "layer_indexes"),
}
_OURS = {theirs: ours for ours, names in _SAME_ELSEWHERE.items() for theirs in names}

# What PEFT's other methods have, and this one has not.
_NOT_HERE = {
    "exclude_modules": (
        "Leave modules out by a regular expression in target_modules, such as r'(?!.*lm_head).*'"
    ),
    "peft_type": "RandLoraConfig.from_dict reads what a file of PEFT's holds",
}

Config = TypeVar("Config")


def teaching_fields(config: type[Config]) -> type[Config]:
    """Makes a dataclass answer settings that are no fields of it in words that help.

    Decorates the class. Made with such settings, or by position, it raises ConfigError.
    """
    made = config.__init__
    known = [item.name for item in fields(config)]  # type: ignore[arg-type]  # a dataclass

    @functools.wraps(made)
    def __init__(self: Config, *args: Any, **settings: Any) -> None:
        if args:
            raise ConfigError(
                f"{config.__name__}: expected settings by keyword, such as "
                f"{config.__name__}(r=8), found {shown(args[0])}; {config.__name__}(**settings) "
                "takes a dict of them"
            )
        unknown = [name for name in settings if name not in known]
        if unknown:
            found = ". ".join(_remedy(name, known) for name in unknown)
            raise ConfigError(f"{config.__name__}: {found}")
        made(self, **settings)

    config.__init__ = __init__  # type: ignore[method-assign, assignment]
    return config


def _remedy(name: str, known: Collection[str]) -> str:
    """What to write in place of a field that does not exist."""
    start = f"there is no field {shown(name)}"
    if name in _NOT_HERE:
        return f"{start}. {_NOT_HERE[name]}"
    plain = name.lower().replace("-", "_")
    if plain in known or plain in _OURS:
        return f"{start}; here it is {_OURS.get(plain, plain)!r}"
    return f"{start}; near: {nearest(name, known)}"
