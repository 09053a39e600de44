"""The types of linen layers that are known."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.core.scope import DenyList, is_filter_empty

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends import nnx_types
from randlora_jax.front_ends.call_input import Arguments
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import LayerTypes, Table, look_up, of_axes
from randlora_jax.models.names import Path
from randlora_jax.models.quantised import unquantised_class


def _dense(module: nn.Dense) -> LayerType:
    return nnx_types.as_given(nnx_types.DENSE, module)


def _dense_general(module: nn.DenseGeneral) -> LayerType:
    axes, features = (
        tuple(x) if isinstance(x, Iterable) else (x,) for x in (module.axis, module.features)
    )
    known = of_axes(len(axes), len(features), axes, len(module.batch_dims))
    return nnx_types.as_given(known, module)


def _einsum(module: nn.Einsum) -> LayerType | None:
    return nnx_types.of_equation(module.einsum_str, module)  # without one, the call tells


TYPES: Table = {
    **nnx_types.TYPES,
    nn.Dense: _dense,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
    "flax.linen.recurrent.DenseParams": LayerType(KernelLayout("io"), None),  # hands it to its cell
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": LayerType(
        KernelLayout("oi"), fan_in_fan_out=True
    ),
}


# What has kernels and is no linear layer.
OTHER: Mapping[type, str] = {
    nn.Embed: "an embedding",
    nn.Conv: "a convolution",
    nn.ConvLocal: "a convolution",
    nn.ConvTranspose: "a convolution",
    nn.BatchNorm: "a norm",
    nn.LayerNorm: "a norm",
    nn.RMSNorm: "a norm",
    nn.GroupNorm: "a norm",
    nn.InstanceNorm: "a norm",
}


def type_of(
    types: LayerTypes, module: nn.Module, method: Callable[..., Any], arguments: Arguments
) -> LayerType | None:
    """What is known of a module that is called: by its class, or an equation among `arguments`."""
    known = types.find(module)
    if isinstance(module, nn.Einsum) and type(module).__call__ is nn.Einsum.__call__:
        return nnx_types.in_call(known, module, method, arguments)
    return known


# Collections that no call of a known type changes; flax itself sows what a call gave.
_UNCHANGED = ("params", "intermediates", "perturbations")


def changes_state(module: nn.Module) -> bool:
    """Whether a layer of flax's may change its collections in this call; others tell by running."""
    if is_filter_empty(module.scope.mutable) or not _is_of_flax(module):
        return False
    held = [name for name, collection in module.variables.items() if collection]
    return any(module.is_mutable_collection(name) for name in held if name not in _UNCHANGED)


def may_change(module: nn.Module) -> bool | tuple[str, ...]:
    """Collections that a layer may change in this call, as linen's ``mutable``; False for none."""
    mutable = module.scope.mutable
    if is_filter_empty(mutable) or _is_of_flax(module):
        return False
    if isinstance(mutable, bool | DenyList):
        return True
    return (mutable,) if isinstance(mutable, str) else tuple(mutable)


def _is_of_flax(module: nn.Module) -> bool:
    """Whether its call is that of one of flax's own layers."""
    known = [kind for kind in type(module).__mro__ if look_up(TYPES, kind)]
    return any(type(module).__call__ is kind.__call__ for kind in known)


def unquantised(module: nn.Module) -> nn.Module:
    """A module like `module`, of the class that its own was made of by a quantiser."""
    copy = module.copy()
    copy.__class__ = unquantised_class(type(module))
    return copy


def is_bridge(module: nn.Module) -> bool:
    """Whether a linen module runs an nnx one: an ``nnx.bridge.ToLinen``, or a copy of that class.

    MaxText has one of its own.
    """
    made_of = {"nnx_class", "args", "kwargs", "skip_rng"}
    return made_of <= {field.name for field in dataclasses.fields(module)}


def modules_inside(bridge: Any) -> dict[Path, nnx.Module]:
    """The nnx modules in a linen one, without their arrays, by their paths in it."""

    def made() -> nnx.Module:
        rngs = {} if bridge.skip_rng else {"rngs": nnx.Rngs(0)}
        return bridge.nnx_class(*bridge.args, **bridge.kwargs, **rngs)

    return dict(nnx.iter_modules(nnx.eval_shape(made)))


def kinds_of(module: nn.Module) -> set[type]:
    """The class of a linen module, and those of the nnx modules in one that runs such."""
    inside = modules_inside(module).values() if is_bridge(module) else ()
    return {type(module), *map(type, inside)}
