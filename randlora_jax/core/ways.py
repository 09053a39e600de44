"""How a layer may run with its adapters: three exact ways, and the reasons against each.

    delta in the kernel     the layer once, with W + delta_W; needs only the kernel's layout
    delta beside, formed    the untouched layer, plus x @ delta_W
    delta beside, factored  the same, with delta_W left in its factors

Which of the possible ones is cheapest is another question (`cost`).
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax.core.contraction import Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.interop.errors import ConfigError, shown

Apply = Literal["auto", "factored", "merged"]


class Way(enum.Enum):
    """An exact way to run a layer with its adapters."""

    IN_KERNEL = "W + delta_W"
    FORMED = "x delta_W beside"
    FACTORED = "factored"


@dataclass(frozen=True)
class ExecutionOptions:
    """How layers apply their adapters: the user's word on it, the same for all of them.

    Args:
      apply: "auto" takes the cheapest exact way of each pass; "merged" always forms delta_W,
        "factored" never does.
      token_axes: the mesh axes that split a batch, where a trace cannot see it.

    Raises:
      ConfigError: `apply` is none of the three.
    """

    apply: Apply = "auto"
    token_axes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.apply, str) or self.apply not in get_args(Apply):
            raise ConfigError(f"apply={shown(self.apply)}: expected 'auto', 'factored' or 'merged'")


@dataclass(frozen=True)
class PossibleWays:
    """The ways a layer may run.

    Args:
      forward: for the output.
      inputs: for the gradient of the input.
      trained: for the gradient of lambda and gamma.
      against: the reason against each way that is impossible, be it only for the output.
      caution: what the output loses in the only way that there is; "" where it loses nothing.
    """

    forward: tuple[Way, ...]
    inputs: tuple[Way, ...]
    trained: tuple[Way, ...]
    against: Mapping[Way, str]
    caution: str = ""


def possible_ways(
    kernel: Kernel,
    contraction: Contraction | None,
    dtype: DTypeLike,
    options: ExecutionOptions,
    *,
    drops: bool = False,
) -> PossibleWays:
    """How a layer may run, and why not otherwise. Both running and explaining ask this.

    Args:
      kernel: as the layer holds it.
      contraction: the layer as a sum over axes of its input; None where it is anything else.
      dtype: what the layer multiplies in.
      drops: an adapter sees dropout(x) in place of x.
    """
    against: dict[Way, str] = {}
    if contraction is None:
        unknown = "the layer is not known to be a sum over axes of its input"
        against = {Way.FORMED: unknown, Way.FACTORED: unknown}
    if kernel.refusal:
        against[Way.IN_KERNEL] = kernel.refusal
    elif drops:
        against[Way.IN_KERNEL] = "under adapter dropout the layer itself must see its whole input"
    refused = {"factored": (Way.IN_KERNEL, Way.FORMED), "merged": (Way.FACTORED,), "auto": ()}
    for way in refused[options.apply]:
        against.setdefault(way, f"apply={options.apply!r} was asked for")
    inputs = tuple(way for way in Way if way not in against)
    beside = tuple(way for way in inputs if way is not Way.IN_KERNEL)
    may_drown = Way.IN_KERNEL in inputs and options.apply == "auto"
    coarsest = min(dtype, kernel.array.dtype, key=_bits) if may_drown else dtype
    drowns = may_drown and _bits(coarsest) < 32
    drowning = f"a small delta_W would drown in the rounding of W to {jnp.dtype(coarsest).name}"
    if drowns and not beside:
        caution = f"{drowning}: state what the layer computes, in layer_types="
        return PossibleWays(inputs, inputs, inputs, against, caution)
    # The gradient of the input has no small part to lose, but W + delta must be as fine as that is.
    if drowns and _bits(coarsest) < _bits(dtype):
        inputs = beside
    # The gradient of delta is the same through W + delta and beside. Beside, it can be summed over
    # devices when it is small (`mesh`), and rows are merged first (`applying`).
    trained = beside if Way.FORMED in beside else inputs
    if drowns:
        against[Way.IN_KERNEL] = f"in the output, {drowning}"
    return PossibleWays(beside if drowns else inputs, inputs, trained, against)


def _bits(dtype: DTypeLike) -> int:
    """Of a floating number."""
    return int(jnp.finfo(dtype).bits)


def require_a_way(name: str, possible: PossibleWays) -> None:
    """Nothing, if the layer `name` has a way to run.

    Raises:
      ConfigError: with the reason against each way, and what to do.
    """
    if possible.forward:
        return
    reasons = "; ".join(f"{way.value}: {reason}" for way, reason in possible.against.items())
    raise ConfigError(
        f"layer {name!r} cannot run with its adapters. {reasons}. Say what the layer computes with "
        "layer_types={...: LayerType(layout, Contraction(equation))}, leave it out of "
        "target_modules, or set randlora_dropout=0 and apply='auto'"
    )
