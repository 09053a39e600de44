"""The wrapper of a module with items of its own, which a parent counts, walks or looks for."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from randlora_jax.front_ends.nnx.call import open_for
from randlora_jax.front_ends.nnx.layer import RandLoraLayer

_ASKED = ("__len__", "__iter__", "__contains__", "__bool__")


def has_items(module: nnx.Module) -> bool:
    """Whether a module answers to ``len``, ``iter``, ``in`` or ``bool``."""
    return any(hasattr(type(module), name) for name in _ASKED)


class RandLoraItems(RandLoraLayer):
    """Stands in the place of a module with items, and has these.

    A class of its own, since what has a length or is iterable is taken for other than a layer.
    """

    def __len__(self) -> int:
        return len(self.base_layer)

    def __bool__(self) -> bool:
        return bool(self.base_layer)

    def __contains__(self, item: Any) -> bool:
        return item in self.base_layer

    def __iter__(self) -> Iterator[Any]:
        if self._call_by_row():
            return iter(self._run("__iter__", (), {}))
        (whole, _), applied = self._effective(), self._applied()
        running = applied and open_for(self.randlora_settings.model, applied)
        return iter(self._in_kernels(whole) if running else whole)
