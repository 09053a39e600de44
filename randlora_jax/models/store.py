"""Where a wrapped model keeps its arrays: what each framework has to provide for that."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import jax

from randlora_jax.core.bases import BasisPair
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState
from randlora_jax.models.slots import SlotTable


class ArrayStore(ABC):
    """The arrays of a wrapped model, wherever its framework keeps them; it decides nothing.

    How a layer runs is another matter: the same store serves whatever runs them.
    """

    @abstractmethod
    def base_leaves(self) -> Mapping[Path, jax.Array]:
        """Every frozen leaf of the base model by path."""

    @abstractmethod
    def set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """Replaces some of them."""

    @abstractmethod
    def dequantised(self) -> Mapping[Path, jax.Array]:
        """The numbers of every quantised array of the base model, by the path of its integers.

        Raises:
          ConfigError: one cannot be read.
        """

    @abstractmethod
    def put_floats(self, leaves: Mapping[Path, jax.Array]) -> None:
        """Puts arrays in place of what `dequantised` gave; the model then runs as it did before."""

    @abstractmethod
    def install(
        self, registry: AdapterRegistry, spec: AdapterSpec, state: AdapterState, rngs: Any
    ) -> None:
        """Stores an adapter's arrays; `rngs` is for dropout.

        Raises:
          ConfigError: the adapter has dropout, is to train, and there is no way to draw.
        """

    @abstractmethod
    def remove(self, adapter_name: str) -> None:
        """Forgets an adapter's arrays."""

    @abstractmethod
    def state(self, adapter_name: str) -> AdapterState:
        """The arrays of an adapter as they are now, or of a stack by its name."""

    @abstractmethod
    def set_pairs(self, pairs: Mapping[str, BasisPair]) -> None:
        """Replaces the shared pairs on the device, by their identity as text."""

    @abstractmethod
    def pairs(self) -> Mapping[str, BasisPair]:
        """The shared pairs on the device."""

    @abstractmethod
    def set_slots(self, table: SlotTable | None) -> None:
        """Replaces the table of slots on the device; None where there is none."""

    @abstractmethod
    def slots(self) -> SlotTable | None:
        """The table of slots on the device."""

    @abstractmethod
    def follow(self, registry: AdapterRegistry) -> None:
        """The registry says otherwise which adapters are active, trained or merged."""

    @abstractmethod
    def release(self) -> Any:
        """The base model as its framework knows it, without a trace of adapters."""
