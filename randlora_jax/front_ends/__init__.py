"""Front ends: where each framework keeps its arrays, and how it runs its layers.

Importing this makes those of the library known. They do not know of each
other; `bridge` knows two, for models of both.
"""

# The last one is asked first. Any model may be a pytree, so that one comes first here.
from randlora_jax.front_ends import pytree  # isort: skip
from randlora_jax.front_ends import linen, nnx  # isort: skip
from randlora_jax.front_ends import bridge  # isort: skip

__all__ = ["bridge", "linen", "nnx", "pytree"]
