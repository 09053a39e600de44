"""What a front end provides: it stores arrays and runs layers, and decides nothing."""

from collections.abc import Mapping
from typing import Any

import jax

from randlora_jax.core.bases import Bases, BasisIdentity
from randlora_jax.core.layers import AdapterSpec
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterState, Book


class FrontEnd:
    """The arrays of an adapted model, wherever its framework keeps them."""

    _book: Book

    def _base_leaves(self) -> Mapping[Path, jax.Array]:
        """Every frozen leaf of the base model by path."""
        raise NotImplementedError

    def _set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        """Replaces some of them."""
        raise NotImplementedError

    def _install(self, spec: AdapterSpec, state: AdapterState, rngs: Any) -> None:
        """Stores an adapter's arrays; `rngs` is for dropout."""
        raise NotImplementedError

    def _remove(self, adapter_name: str) -> None:
        """Forgets an adapter's arrays."""
        raise NotImplementedError

    def _state(self, adapter_name: str) -> AdapterState:
        """The arrays of an adapter as they are now."""
        raise NotImplementedError

    def _trainable_leaves(self) -> list[jax.Array]:
        """What an optimizer sees."""
        raise NotImplementedError

    def _set_bases(self, bases: Mapping[BasisIdentity, Bases]) -> None:
        """Replaces the shared pairs on the device."""
        raise NotImplementedError

    def _sync(self) -> None:
        """The book says otherwise which adapters are active, trained or merged."""
        raise NotImplementedError

    def _release(self) -> Any:
        """The base model as its framework knows it, without wrappers."""
        raise NotImplementedError
