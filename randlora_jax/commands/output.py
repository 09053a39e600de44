"""The directory that a command writes to: what must not be lost there, and what made room."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from randlora_jax.commands.report import Misuse, plain
from randlora_jax.interop.atomic import Replaced
from randlora_jax.interop.base_model import MODEL_CONFIG
from randlora_jax.interop.config import CONFIG_NAME

# Files that hold a model's weights, in any format; an adapter's and a trainer's own are not such.
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.index.json"),
    *("*.gguf", "*.onnx", "*.pt", "*.pth", "*.ckpt*"),
)
_NO_WEIGHTS = (
    *("adapter_*", "non_lora_trainables*", "training_args.*"),
    *("optimizer.*", "scheduler.*", "scaler.*", "rng_*"),
)


class Output:
    """Where a command writes: looked at before the work, and again when all is ready.

    Attributes:
      folder: the directory, which need not exist.
      force: whether files there may be replaced.
      refusal: why nothing may be written to a directory even so; "" where it may.
      replaced: what made room; known once all is in place.
    """

    def __init__(self, folder: str | Path, *, force: bool, refusal: Callable[[Path], str]) -> None:
        if not str(folder).strip():
            raise Misuse(f"expected a directory to write to, found {str(folder)!r}; name one")
        self.folder = Path(folder)
        self.force = force
        self.refusal = refusal
        self.replaced = Replaced()

    def expect(self, names: Iterable[str]) -> None:
        """Stop before any work is done that would end in a refusal.

        Args:
          names: files that are to be written, or to go.

        Raises:
          Misuse: `folder` is no place for them, or has one and `force` is not set.
          OSError: nobody can tell what it is.
        """
        for place in (self.folder, *self.folder.parents):
            if place.exists() and not place.is_dir():
                raise Misuse(
                    f"{self.folder}: expected a directory, but {place} is a file; name another"
                )
        with suppress(FileNotFoundError):
            self.folder.stat()  # links that lead in a circle
        if why := self.refusal(self.folder):
            raise Misuse(f"{self.folder} {why}; name another directory")
        there = [name for name in names if os.path.lexists(self.folder / name)]
        if there and not self.force:
            raise Misuse(f"{self.folder / there[0]} exists; allow with --force that it is replaced")

    def allow(self, replaced: Replaced) -> None:
        """What `replacing_files` asks when all is ready: much may have appeared meanwhile.

        Raises:
          Misuse: as `expect`.
        """
        self.expect(replaced.names)
        self.replaced = replaced

    def lines(self) -> list[str]:
        """What made room, for people."""
        done = {"overwritten": self.replaced.overwritten, "removed": self.replaced.removed}
        return [
            f"{what} in {self.folder}: {', '.join(map(plain, names))}"
            for what, names in done.items()
            if names
        ]

    def data(self) -> dict[str, list[str]]:
        """The same for machines."""
        return {
            "overwritten": list(self.replaced.overwritten),
            "removed": list(self.replaced.removed),
        }


def holds_a_model(folder: Path) -> str:
    """Why no adapter may be written to `folder`."""
    if not (folder / MODEL_CONFIG).exists():
        return ""
    weights = [name for name in sorted(os.listdir(folder)) if are_weights(name)]
    if not weights:
        return ""
    return (
        f"holds a model ({MODEL_CONFIG} and {plain(weights[0])}), on top of which transformers "
        "would load the adapter from then on"
    )


def holds_an_adapter(folder: Path) -> str:
    """Why no merged model may be written to `folder`."""
    if not (folder / CONFIG_NAME).exists():
        return ""
    return "holds an adapter, which transformers would load on top of the merged model"


def are_weights(name: str) -> bool:
    """Whether a file's name is that of a model's weights, or of a part of them."""
    return is_like(name, _WEIGHTS) and not is_like(name, _NO_WEIGHTS)


def is_like(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (fnmatch) matches."""
    return any(fnmatch(name, pattern) for pattern in patterns)
