"""The types of Variable by which nnx's filters tell what trains from what does not."""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

# A trained leaf: lambda, gamma, or a leaf of a module trained whole. Flax's own type for adapters,
# which trainers look for: `wrt=AdapterParam` trains exactly these. It is an ``nnx.Param``, so a
# filter for the base model's leaves must leave it out.
AdapterParam = nnx.LoRAParam


class FrozenAdapterParam(nnx.Param[jax.Array]):
    """A leaf of an adapter that is applied or kept, but not trained.

    A Param, since code that scans over layers may slice these along another axis than all else.
    """


class FrozenLoRAParam(nnx.Param[jax.Array]):
    """A LoRA that the base model came with: frozen, as all of the base."""


class SharedBasis(nnx.Param[jax.Array]):
    """One of the two frozen random bases of a pair; the root wrapper alone holds them."""


def retype(leaf: nnx.Variable[jax.Array], *, trained: bool) -> None:
    """Makes `leaf` one that is trained, or one that is not.

    In place: ``nnx.cached_partial``, as trainers use it, goes on with the Variables it was given,
    so that a new one in its stead would never be trained again.
    """
    leaf.__class__ = AdapterParam if trained else FrozenAdapterParam


def retype_loras(
    modules: Iterable[tuple[tuple[Any, ...], nnx.Module]],
    old: type[nnx.Variable],
    new: type[nnx.Variable],
) -> None:
    """Makes `new` of the base model's own LoRA parameters, which are `old`.

    Args:
      modules: all of the model's, with their paths.
    """
    for _, module in modules:
        for name, value in list(vars(module).items()):
            if type(value) is old:
                setattr(module, name, new(value.get_raw_value(), **value.get_metadata()))
