"""RandLoRA fine-tuning for JAX models, in the file format of PyTorch PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from randlora_jax.config import RandLoraConfig as RandLoraConfig
    from randlora_jax.errors import AdapterFileError as AdapterFileError
    from randlora_jax.errors import ConfigError as ConfigError
    from randlora_jax.errors import RandLoraError as RandLoraError
    from randlora_jax.errors import TargetError as TargetError
    from randlora_jax.model import RandLoraModel as RandLoraModel
    from randlora_jax.model import get_peft_model as get_peft_model
    from randlora_jax.nnx import AdapterParam as AdapterParam
    from randlora_jax.nnx import FrozenAdapterParam as FrozenAdapterParam

# Imported when first asked for: the command line reads adapter files without loading jax.
_HOMES = {
    "RandLoraConfig": "config",
    "AdapterFileError": "errors",
    "ConfigError": "errors",
    "RandLoraError": "errors",
    "TargetError": "errors",
    "RandLoraModel": "model",
    "get_peft_model": "model",
    "AdapterParam": "nnx",
    "FrozenAdapterParam": "nnx",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"randlora_jax.{_HOMES[name]}"), name)
