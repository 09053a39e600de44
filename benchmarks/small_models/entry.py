"""What the driver needs to know of one model of a code base."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax import RandLoraConfig, SampleInputs


@dataclass(frozen=True)
class CodeBase:
    """Where a code base is found, and what of it is run.

    Args:
      name: as its users call it.
      version: that was run.
      framework: of its models.
      paths: folders to import from, below the one with all checkouts.
      models: by name, each made afresh by a call.
    """

    name: str
    version: str
    framework: str
    paths: tuple[str, ...]
    models: Mapping[str, Callable[[], "Entry"]]


@dataclass(frozen=True)
class Entry:
    """One small model.

    Args:
      model: an nnx module, or a linen module bound to its variables.
      inputs: by name, in the order in which they are passed.
      call: (the model, *inputs) -> an array that depends on every layer.
      said: what a user says by hand when wrapping, as arguments of `get_peft_model` or of the
        config; it may mention the inputs.
    """

    model: Any
    inputs: Mapping[str, Any]
    call: Callable[..., jax.Array] = lambda model, *inputs: model(*inputs)
    said: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", noisy(self.model))

    def stated(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """`said`: arguments of the config, and of `get_peft_model`."""
        whole = eval(f"dict({self.said})", {**self.inputs, "SampleInputs": SampleInputs})
        fields = {field.name for field in dataclasses.fields(RandLoraConfig)}
        config = {name: value for name, value in whole.items() if name in fields}
        return config, {name: value for name, value in whole.items() if name not in fields}


def ids(rows: int = 3, columns: int = 8) -> jax.Array:
    """(rows, columns) token ids below 60."""
    return jnp.asarray(np.random.default_rng(0).integers(3, 60, (rows, columns)), jnp.int32)


def normal(*shape: int) -> jax.Array:
    """An array of random numbers."""
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def noisy(model: Any) -> Any:
    """`model` with noise on its parameters, so that no zero hides what depends on what."""
    draws = np.random.default_rng(2)

    def noise(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x + jnp.asarray(0.1 * draws.standard_normal(x.shape), x.dtype)

    if isinstance(model, nn.Module):
        module, variables = model.unbind()
        return module.bind({**variables, "params": jax.tree.map(noise, variables["params"])})
    for _, held in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        held.set_raw_value(noise(held.get_raw_value()))
    return model


def bound(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """A linen module bound to fresh variables."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return module.bind(module.init(rngs, *args, **kwargs))
