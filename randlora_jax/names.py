"""What the layers of a model are called in PyTorch: `get_peft_model(..., names=Names(...))`."""

from randlora_jax.models.names import Names

__all__ = ["Names"]
