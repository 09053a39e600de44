"""``flax.nnx``: arrays are Variables of the modules, adapted layers are replaced in place."""

from randlora_jax.front_ends.nnx.model import NnxRandLora as NnxRandLora
from randlora_jax.front_ends.nnx.variables import AdapterParam as AdapterParam
from randlora_jax.front_ends.nnx.variables import FrozenAdapterParam as FrozenAdapterParam
