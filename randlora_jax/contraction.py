"""What a layer of a user's own computes, as a sum over axes of its input."""

from randlora_jax.core.contraction import LAST_AXES, Contraction

__all__ = ["LAST_AXES", "Contraction"]
