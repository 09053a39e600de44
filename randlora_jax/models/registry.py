"""What a wrapped model knows (`Book`) and trains (`AdapterState`), apart from any framework."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from randlora_jax.core.bases import Box, peft_box
from randlora_jax.core.layers import AdapterSpec, How, Layer
from randlora_jax.core.mesh import on_host
from randlora_jax.interop import targets
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import TargetError
from randlora_jax.models.names import Names, Path
from randlora_jax.models.origins import Stored


@dataclass
class AdapterState:
    """The trained numbers of one adapter.

    layers: by `Layer.name`, (lambda (*stack, r, n), gamma (*stack, n, min)), float32.
    saved: leaves of wholly trained modules and biases, by their path in the model.
    """

    layers: dict[str, tuple[jax.Array, jax.Array]]
    saved: dict[Path, jax.Array] = field(default_factory=dict)

    def on_host(self) -> "AdapterState":
        """In host memory, whole; called by every process that holds a part."""
        return AdapterState(
            {n: (on_host(lam), on_host(gamma)) for n, (lam, gamma) in self.layers.items()},
            {path: on_host(x) for path, x in self.saved.items()},
        )

    def size(self) -> int:
        """How many numbers it trains."""
        return sum(x.size for x in jax.tree.leaves((self.layers, list(self.saved.values()))))


@dataclass(frozen=True)
class Origin:
    """What a base model says of itself; PEFT records it with an adapter."""

    model_type: str | None = None
    name_or_path: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    has_output_head: bool = False  # and names it as Hugging Face does


@dataclass(frozen=True, eq=False)
class Book:
    """All a wrapped model knows that is not an array on a device; replaced, never changed.

    Compared by identity, so that a model whose book was replaced is retraced under ``jit``.
    """

    layers: Mapping[str, Layer]
    modules: tuple[str, ...]  # canonical names of every module that owns arrays
    names: Names
    origin: Origin
    how: How
    configs: Mapping[str, RandLoraConfig] = field(default_factory=dict)
    specs: Mapping[str, AdapterSpec] = field(default_factory=dict)
    stored: Stored = field(default_factory=dict)
    active: tuple[str, ...] = ()  # adapters that are applied
    trained: frozenset[str] = frozenset()  # adapters that train when they are active
    merged: tuple[str, ...] = ()  # adapters whose deltas are in the base kernels
    originals: Mapping[Path, np.ndarray] = field(default_factory=dict)  # kernels before merging

    @property
    def replicated(self) -> NamedSharding | None:
        """Where to put what every device needs whole: on the mesh that holds the base kernels."""
        meshes = {layer.sharding.mesh for layer in self.layers.values() if layer.sharding}
        return NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None

    def owners(self) -> dict[str, Layer]:
        """The layer that holds the matrix of each canonical name.

        Raises:
          TargetError: two layers have one name.
        """
        found: dict[str, Layer] = {}
        for layer in self.layers.values():
            for name in layer.names:
                if name in found:
                    raise TargetError(
                        f"{found[name].name!r} and {layer.name!r} both have the canonical name "
                        f"{name!r}: correct the names rules"
                    )
                found[name] = layer
        return found

    def select(self, config: RandLoraConfig) -> dict[str, Layer]:
        """The canonical names that `config` adapts, with the layer that holds each.

        Raises:
          TargetError: it selects none, or a part of what one array holds.
        """
        owners = self.owners()
        heads = [name for name in owners if targets.is_output_head(name)]
        chosen = targets.select(
            config,
            list(owners),
            [m for m in self.modules if m not in owners],
            model_type=self.origin.model_type,
            output_embedding=heads[0] if heads and self.origin.has_output_head else None,
        )
        for layer in {owners[name].name: owners[name] for name in chosen}.values():
            left_out = sorted(set(layer.names) - set(chosen))
            if left_out:
                raise TargetError(
                    f"target_modules takes a part of {layer.name!r}, one array that holds "
                    f"{len(layer.names)} layers; {left_out} would be left out. Adapt all or none"
                )
        return {name: owners[name] for name in chosen}

    def box(self, chosen: Mapping[str, Layer], r: int) -> Box:
        """The extents of PEFT's pair for the layers `chosen`."""
        return peft_box([layer.matrix for layer in chosen.values()], r)
