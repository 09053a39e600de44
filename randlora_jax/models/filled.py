"""A wrapped model is asked for numbers that it has not, or not as it was wrapped.

It may be of shapes alone (`core.abstract`), or traced, or hold another model's leaves.
"""

from collections.abc import Iterable
from typing import Any

import jax

from randlora_jax.core.abstract import some_abstract
from randlora_jax.core.bases import used_extents
from randlora_jax.core.hoisting import is_traced
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import Layer


def refuse_abstract(arrays: Iterable[Any]) -> None:
    """Nothing, if all arrays of some trees have numbers.

    Raises:
      ConfigError: one is a shape alone.
    """
    if some_abstract(list(arrays)):
        raise ConfigError(
            "this wrapped model is abstract: it has shapes and no numbers yet. Fill it first with "
            "what was restored: nnx.update(model, state), or model.variables = variables where it "
            "has these"
        )


def refuse_traced(arrays: Iterable[Any], what: str) -> None:
    """Nothing, if all arrays of some trees have numbers that can leave the device.

    Raises:
      ConfigError: one is traced.
    """
    if is_traced(list(arrays)):
        raise ConfigError(
            f"{what}: this model is being traced (jax.jit, jax.grad, jax.eval_shape), and the "
            "numbers are wanted in host memory: call it outside, and pass the model, or what it "
            "gives, to what is traced"
        )


def refuse_mapped(layer: Layer, arrays: Iterable[Any]) -> None:
    """Nothing, if lambda and gamma, as they lie along a kernel, have the axes of one model.

    Raises:
      ConfigError: they have others.
    """
    stacked = len(layer.stack)
    axes = max(len(layer.layout.axes), stacked + 2) if stacked else 2
    for x in arrays:
        if x.ndim != axes:
            raise ConfigError(
                f"{layer.name!r}: expected {axes} axes of lambda and gamma, found {x.ndim}, of "
                f"shape {x.shape}: the model was wrapped inside nnx.vmap, or its state was stacked "
                "since, so this is many models in one. They run under nnx.vmap; for all else wrap "
                "the stacked model, or take one out: nnx.merge(nnx.graphdef(model), "
                "jax.tree.map(lambda x: x[i], nnx.state(model)))"
            )


def refuse_misfit(
    layer: Layer, adapter_name: str, r: int, lam: jax.Array, gamma: jax.Array
) -> None:
    """Nothing, if lambda and gamma are of an adapter of rank r.

    Args:
      lam, gamma: stack axes first, if there are any.

    Raises:
      ConfigError: they are not.
    """
    _, n, smallest = used_extents(layer.matrix, r)
    found, expected = (lam.shape[-2:], gamma.shape[-2:]), ((r, n), (n, smallest))
    if found != expected:
        raise ConfigError(
            f"adapter {adapter_name!r} of {layer.name!r}: expected lambda and gamma of the shapes "
            f"{expected[0]} and {expected[1]}, found {found[0]} and {found[1]}: these leaves were "
            "trained with another r, or for another layer. Restore them into a model that was "
            "wrapped with their configuration (check_randlora_settings tells before)"
        )
