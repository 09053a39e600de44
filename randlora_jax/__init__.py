"""RandLoRA fine-tuning for JAX models, in the file format of PyTorch PEFT."""

from randlora_jax.config import RandLoraConfig
from randlora_jax.errors import AdapterFileError, ConfigError, RandLoraError, TargetError
from randlora_jax.model import RandLoraModel, get_peft_model
from randlora_jax.nnx import AdapterParam, FrozenAdapterParam

__all__ = [
    "AdapterFileError",
    "AdapterParam",
    "ConfigError",
    "FrozenAdapterParam",
    "RandLoraConfig",
    "RandLoraError",
    "RandLoraModel",
    "TargetError",
    "get_peft_model",
]
