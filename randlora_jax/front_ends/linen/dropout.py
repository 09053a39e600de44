"""An adapter's dropout in linen modules: drawn where they run, from a rng of the call."""

from collections.abc import Callable
from dataclasses import dataclass, field

import flax.linen as nn
import jax

from randlora_jax.core.applying import dropout
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import Layer


@dataclass
class Drawing:
    """Draws what adapters drop in one call, on exactly where the call has a rng for it.

    Args:
      stream: the name of that rng.
    """

    stream: str = "dropout"
    _in_call: bool | None = field(default=None, init=False)  # None until a module runs

    @property
    def is_on(self) -> bool:
        """Whether the call has the rng."""
        return bool(self._in_call)

    def meet(self, module: nn.Module) -> None:
        """Takes down what the call has, of the outermost module that runs: it is met first."""
        if self._in_call is None and module.scope is not None:
            self._in_call = module.has_rng(self.stream)

    def of(
        self, module: nn.Module, layer: Layer, rate: float
    ) -> Callable[[jax.Array], jax.Array] | None:
        """The dropout of an adapter in a layer of `module`; None where it is off, or there is none.

        Raises:
          ConfigError: the call has the rng, and the layer does not get it.
        """
        if rate and module.has_rng(self.stream):
            return dropout(rate, module.make_rng(self.stream))
        if rate and self.is_on:
            raise ConfigError(
                f"layer {layer.name!r}: adapter dropout is on in this call, by its rng "
                f"{self.stream!r}, and a scan, vmap or loop around this layer hands that rng not "
                f"on: name it there, split_rngs={{..., {self.stream!r}: True}} (of nn.remat and "
                "nn.map_variables: rngs=True), or set randlora_dropout=0.0"
            )
        return None
