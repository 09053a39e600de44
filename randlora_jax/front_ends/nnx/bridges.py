"""Modules of another framework inside an nnx model: who tells what is in them, and runs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.models.finding import FoundModule, StatedLayouts
from randlora_jax.models.names import Path


class Bridge(NamedTuple):
    """How a type of module is dealt with that holds a model of another framework.

    Args:
      accepts: whether a module is of it.
      modules: (its path, the module, what users state) -> what is inside, with whole paths.
      wrapper: runs the module with its adapters.
      unquantise: makes the module run without the quantiser that its own was made for.
    """

    accepts: Callable[[Any], bool]
    modules: Callable[[Path, Any, StatedLayouts], list[FoundModule]]
    wrapper: type[RandLoraLayer]
    unquantise: Callable[[Any], None]


_bridges: list[Bridge] = []


def register_bridge(bridge: Bridge) -> None:
    """Makes one known."""
    _bridges.append(bridge)


def bridge_of(module: Any) -> Bridge | None:
    """The one for a module; None where it is of nnx itself."""
    return next((bridge for bridge in _bridges if bridge.accepts(module)), None)
