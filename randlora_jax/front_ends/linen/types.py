"""The types of linen layers that are known."""

from collections.abc import Iterable

import flax.linen as nn

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_axes, of_einsum

DENSE = LayerType(KernelLayout("io"))


def _dense_general(module: nn.DenseGeneral) -> LayerType:
    axes, features = (
        tuple(x) if isinstance(x, Iterable) else (x,) for x in (module.axis, module.features)
    )
    return of_axes(len(axes), len(features), axes, len(module.batch_dims))


def _einsum(module: nn.Einsum) -> LayerType | None:
    return of_einsum(module.einsum_str) if module.einsum_str else None  # else the call tells


TYPES: Table = {
    nn.Dense: DENSE,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": LayerType(
        KernelLayout("oi"), fan_in_fan_out=True
    ),
}
