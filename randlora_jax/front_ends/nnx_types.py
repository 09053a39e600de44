"""The types of nnx layers that are known, in whichever framework they lie."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.front_ends.call_input import Arguments
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table, of_axes, of_einsum

DENSE = LayerType(KernelLayout("io"))

# How flax's layers are given what else to do with the kernel, and what they do of themselves.
_GIVEN = ("dot_general", "dot_general_cls", "einsum_op", "promote_dtype")
_OWN = (
    *(None, jax.lax.dot_general, jnp.einsum),
    *(linen_dtypes.promote_dtype, nnx_dtypes.promote_dtype),
)


def as_given(known: LayerType, module: Any) -> LayerType:
    """`known` of a layer of flax's; not its call, where it was given a function of the user's own.

    What that computes nobody knows: it may round, scale or mask the kernel.
    """
    given = (getattr(module, name, None) for name in _GIVEN)
    plain = all(any(function is own for own in _OWN) for function in given)
    return known if plain else replace(known, call=None)


def _linear(module: nnx.Linear) -> LayerType:
    return as_given(DENSE, module)


def _linear_general(module: nnx.LinearGeneral) -> LayerType:
    sides = len(module.in_features), len(module.out_features)
    return as_given(of_axes(*sides, module.axis, len(module.batch_axis)), module)


def of_equation(equation: str | None, module: Any) -> LayerType | None:
    """What an Einsum computes by an equation; None where its kernel forms no matrices."""
    try:
        return as_given(of_einsum(equation), module) if equation else None
    except ConfigError:
        return None


def in_call(
    known: LayerType | None, module: Any, method: Callable[..., Any], arguments: Arguments
) -> LayerType | None:
    """What is known of a layer in a call: an Einsum, of nnx or linen, may be told its equation.

    Args:
      known: of the layer.
      method: a function that takes the module first.
    """
    args, kwargs = arguments
    bound = inspect.signature(method).bind(module, *args, **kwargs)
    equation = bound.arguments.get("einsum_str")
    return of_equation(equation, module) if equation else known


def _einsum(module: nnx.Einsum) -> LayerType | None:
    return of_equation(module.einsum_str, module)


TYPES: Table = {
    nnx.Linear: _linear,
    nnx.LoRALinear: _linear,  # its own product beside is one more term
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: _einsum,
}
