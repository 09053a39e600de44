"""The types of Variable by which nnx's filters tell what trains from what does not."""

import jax
from flax import nnx

from randlora_jax.core.hoisting import is_traced

# A trained leaf: lambda, gamma, or a leaf of a module trained whole. Flax's own type for adapters,
# which trainers look for: `wrt=AdapterParam` trains exactly these. It is an ``nnx.Param``, so a
# filter for the base model's leaves must leave it out.
AdapterParam = nnx.LoRAParam


class FrozenAdapterParam(nnx.Param[jax.Array]):
    """A leaf of an adapter that is applied or kept, but not trained.

    A Param, since code that scans over layers may slice these along another axis than all else.
    """


class CarriedParam(FrozenAdapterParam):
    """What an adapter's file carries of the base model: frozen while the adapter trains, too."""


class FrozenLoRAParam(nnx.Param[jax.Array]):
    """A LoRA that the base model came with: frozen, as all of the base."""


class SharedBasis(nnx.Param[jax.Array]):
    """One of the two frozen random bases of a pair; the root wrapper alone holds them."""


class AdapterSlots(nnx.Variable[jax.Array]):
    """A part of the table that tells what the slots of stacked adapters stand for."""


def retyped(leaf: nnx.Variable[jax.Array], *, trained: bool) -> nnx.Variable[jax.Array]:
    """`leaf` as what is trained, or as what is not; what is carried never is.

    The same Variable: ``nnx.cached_partial``, as trainers use it, goes on with those it was given,
    and would train another one's value no more. In a trace a new one, which flax carries out of
    there, as it does no change of type.
    """
    if isinstance(leaf, CarriedParam):
        return leaf
    kind = AdapterParam if trained else FrozenAdapterParam
    value = leaf.get_raw_value()
    if type(leaf) is not kind and is_traced(value):
        return kind(value)
    leaf.__class__ = kind
    return leaf
