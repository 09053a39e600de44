"""Layers of a user's own: `get_peft_model(..., layer_types={MyLayer: LayerType(...)})`."""

from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_axes, of_einsum

__all__ = ["LayerType", "Table", "of_axes", "of_einsum"]
