"""``flax.linen``: arrays are collections, layers are met by an interceptor while the model runs."""

from randlora_jax.front_ends.linen.hugging_face import HuggingFaceRandLora as HuggingFaceRandLora
from randlora_jax.front_ends.linen.model import LinenRandLora as LinenRandLora
