"""Directories of models and adapters, as both demonstrations meet them."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any


def of_package(name: str, target: str) -> Path:
    """The folder of an installed package that holds data.

    Args:
      target: of make, which installs it.
    """
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the pretrained model is not installed: `make {target}` installs it")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def opened_by_peft() -> Iterator[None]:
    """Within, PEFT opens our adapters without a warning that is not about them."""
    with warnings.catch_warnings():
        # it expects the shared bases under every layer too; the file has them once, which is enough
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        yield


def weight_bytes(directory: Path) -> int:
    """Size of an adapter's weights on disk."""
    return (directory / "adapter_model.safetensors").stat().st_size


def saved_bytes(model: Any) -> int:
    """How large a file PEFT makes of an adapter."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return weight_bytes(Path(scratch))
