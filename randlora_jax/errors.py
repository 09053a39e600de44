"""What the library raises; everything is a `RandLoraError`, which is a `ValueError`."""

from randlora_jax.interop.errors import AdapterFileError, ConfigError, RandLoraError, TargetError

__all__ = ["AdapterFileError", "ConfigError", "RandLoraError", "TargetError"]
