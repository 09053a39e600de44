"""How to adapt: `RandLoraConfig`, PEFT's settings by PEFT's names."""

from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig

__all__ = ["CONFIG_NAME", "RandLoraConfig"]
