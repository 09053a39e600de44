"""The types of nnx layers that are known, in whichever framework they lie."""

from flax import nnx

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_axes, of_einsum


def _linear_general(module: nnx.LinearGeneral) -> LayerType:
    sides = len(module.in_features), len(module.out_features)
    return of_axes(*sides, module.axis, len(module.batch_axis))


def _einsum(module: nnx.Einsum) -> LayerType:
    return of_einsum(module.einsum_str)


TYPES: Table = {
    nnx.Linear: LayerType(KernelLayout("io")),
    nnx.LoRALinear: LayerType(KernelLayout("io")),  # its own product beside is one more term
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
}
