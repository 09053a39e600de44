"""Adapters of a folder in the slots of a model: loaded when asked for, evicted when unused."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax import RandLoraError

BASE = "__base__"  # no adapter: slot 0


class Unknown(Exception):
    """The folder has no such adapter."""


class Refused(Exception):
    """An adapter's files are damaged, or not for this model."""


def adapters_in(folder: Path) -> list[str]:
    """Names of the directories in a folder that are adapters; a link is none."""
    directories = [path for path in folder.iterdir() if not path.is_symlink()]
    return sorted(path.name for path in directories if (path / "adapter_config.json").exists())


@dataclass(eq=False)
class Held:
    """An adapter that has a slot, or is being loaded into one."""

    slot: asyncio.Task[int]
    users: int = 0


class Shelf:
    """What of the folder is in the model.

    A thread of its own reads files and changes the model, so that neither the event loop nor the
    engine waits; programs that run go on with the arrays that they have.

    Args:
      model: after ``stack_adapters(capacity + 1)``: an adapter is loaded, or refused, before
        another one goes.
      folder: has a directory for each adapter, of its name.
      capacity: how many adapters are kept.
      changed: called with the model after each load, in that thread.
    """

    def __init__(
        self, model: Any, folder: Path, capacity: int, changed: Callable[[Any], None]
    ) -> None:
        self.model, self.folder, self.capacity = model, folder, capacity
        self.loaded = self.evicted = 0  # how often
        self._changed, self._held = changed, dict[str, Held]()  # the longest unused one first
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "shelf")

    def names(self) -> list[str]:
        """Of the adapters in the folder."""
        return adapters_in(self.folder)

    def here(self) -> dict[str, int]:
        """Those that have a slot: how many answers use each."""
        return {name: held.users for name, held in self._held.items()}

    async def take(self, name: str) -> int:
        """The slot of an adapter, which keeps it until `give_back`.

        Where all slots are used it waits for one, and whoever comes later waits behind.

        Raises:
          Unknown: the folder has no such adapter.
          Refused: it cannot be loaded.
        """
        if name == BASE:
            return 0
        async with self._turn:
            if name not in self._held:
                if name not in self.names():  # a path is no name of a directory in the folder
                    raise Unknown(f"no adapter {name!r} here: GET /adapters names them")
                loading = asyncio.create_task(self._load(name, await self._to_evict()))
                loading.add_done_callback(
                    lambda task: task.exception()
                )  # all who asked may be gone
                self._held[name] = Held(loading)
            held = self._held[name] = self._held.pop(name)  # the last one used
            held.users += 1
        try:
            return await asyncio.shield(held.slot)
        except BaseException:  # it is refused, or whoever asked has gone
            self._let_go(held)
            raise

    def give_back(self, name: str) -> None:
        """One answer less uses the adapter."""
        if name != BASE:
            self._let_go(self._held[name])

    def close(self) -> None:
        """Ends the thread, once the model has no adapter, as it was before."""

        def empty() -> None:
            for name in list(self.model.peft_config):
                self.model.delete_adapter(name)

        self._thread.submit(empty)
        self._thread.shutdown()

    def _let_go(self, held: Held) -> None:
        held.users -= 1
        self._freed.set()

    async def _to_evict(self) -> dict[str, Held]:
        """The longest unused adapter, nobody's from now on; none where there is a free slot."""
        while len(self._held) >= self.capacity:
            unused = next((name for name, held in self._held.items() if not held.users), None)
            if unused:
                return {unused: self._held.pop(unused)}
            self._freed.clear()
            await self._freed.wait()
        return {}

    async def _load(self, name: str, evicted: dict[str, Held]) -> int:
        """The slot of an adapter, which is then in the model, and `evicted` is not."""

        def load() -> int:
            if name not in self.model.peft_config:  # else what was to take its place was refused
                self.model.load_adapter(self.folder / name, name)
            for other in evicted:
                self.model.delete_adapter(other)
            self._changed(self.model)
            return int(np.asarray(self.model.rows([name]))[0])

        try:
            slot = await asyncio.get_running_loop().run_in_executor(self._thread, load)
        except Exception as error:
            del self._held[name]
            self._held = {**evicted, **self._held}  # as before, unless someone asked for it anew
            self._freed.set()
            if isinstance(error, RandLoraError | OSError):
                raise Refused(str(error)) from error
            raise
        self.loaded += 1
        self.evicted += len(evicted)
        return slot
