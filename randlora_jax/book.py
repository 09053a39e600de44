"""What a wrapped model knows (`Book`) and trains (`AdapterState`), apart from any framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from randlora_jax.config import RandLoraConfig
from randlora_jax.delta import Apply
from randlora_jax.layers import AdapterSpec, Layer
from randlora_jax.names import Path
from randlora_jax.origins import Stored


@dataclass
class AdapterState:
    """The trained numbers of one adapter.

    layers: canonical name -> (lambda (*stack, r, n), gamma (*stack, n, min)), float32.
    saved: leaves of wholly trained modules and biases, by their path in the model.
    """

    layers: dict[str, tuple[jax.Array, jax.Array]]
    saved: dict[Path, jax.Array] = field(default_factory=dict)

    def size(self) -> int:
        """How many numbers it trains."""
        return sum(x.size for x in jax.tree.leaves((self.layers, list(self.saved.values()))))


@dataclass(frozen=True)
class Origin:
    """What a base model says of itself; PEFT records it with an adapter."""

    model_type: str | None = None
    name_or_path: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    output_embedding: str | None = None


@dataclass(frozen=True, eq=False)
class Book:
    """All a wrapped model knows that is not an array on a device; replaced, never changed.

    Compared by identity, so that a model whose book was replaced is retraced under ``jit``.
    """

    layers: Mapping[str, Layer]
    modules: tuple[str, ...]  # canonical names of every module, layers and containers included
    origin: Origin
    apply: Apply
    configs: Mapping[str, RandLoraConfig] = field(default_factory=dict)
    specs: Mapping[str, AdapterSpec] = field(default_factory=dict)
    stored: Stored = field(default_factory=dict)
