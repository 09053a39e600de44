"""The name of an adapter: what may be one, and in which folder it is saved.

A name becomes the folder of an adapter and, in PEFT's models, one part of a dotted key
(``<layer>.randlora_lambda.<name>``), so it must be sound as both.
"""

from __future__ import annotations

import os
from pathlib import Path

from randlora_jax.interop.errors import AdapterFileError, ConfigError, shown

DEFAULT = "default"  # PEFT's name of an adapter unless told; saved at the root of a directory

_BASE = "__base__"  # PEFT's word for no adapter, in adapter_names=
# Parts of PEFT's own keys: beside one of them a name could not be told from it.
_KEY_PARTS = ("weight", "bias", "base_layer", "original_module", "modules_to_save")
_LONGEST = 200  # bytes; a folder's name may have 255, and a save adds to it while it writes


def checked_name(name: object) -> str:
    """`name`, if an adapter can have it.

    Raises:
      ConfigError: it is no string, or could not be a folder and a part of PEFT's keys.
    """
    fault = _fault(name)
    if fault:
        raise ConfigError(
            f"adapter name: expected a plain name such as 'default' or 'my-task_2', found "
            f"{shown(name)}, {fault}. It becomes a folder and a part of PEFT's tensor names: "
            "choose another"
        )
    assert isinstance(name, str)
    return name


def _fault(name: object) -> str | None:
    """Why an adapter cannot have this name."""
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    if not name:
        return "which is empty"
    if name != name.strip() or not name.isprintable():
        return "which has spaces at its ends or letters that cannot be printed"
    found = [letter for letter in "./\\" if letter in name]
    if found:
        return f"which has {shown(found[0])} in it"
    if name == _BASE:
        return "which is PEFT's word for no adapter"
    if name in _KEY_PARTS or "randlora_" in name:
        return "which PEFT's tensor names have already"
    if len(name.encode()) > _LONGEST:
        return f"which is longer than {_LONGEST} bytes"
    return None


def expected_directory(directory: object, what: str = "a directory") -> Path:
    """`directory` as a path.

    Raises:
      AdapterFileError: it is no path, empty, or none that a system takes; the message calls it
        `what`.
    """
    text = str(directory)
    if isinstance(directory, str | os.PathLike) and text.strip() and "\0" not in text:
        return Path(directory)
    raise AdapterFileError(
        f"expected {what}, found {shown(directory)}; name one, such as 'my-adapter' ('.' is the "
        "one you work in)"
    )


def saving_folder(directory: str | os.PathLike[str], adapter_name: str = DEFAULT) -> Path:
    """The folder of an adapter under `directory`: itself for "default", else one of its name.

    Raises:
      AdapterFileError: nothing can be written there: `directory` is no path or empty, or a file
        stands where a folder has to be.
    """
    root = expected_directory(directory, "a directory to save to")
    folder = root if adapter_name == DEFAULT else root / adapter_name
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise AdapterFileError(
                f"{folder}: expected a directory to save to, but {place} is a file; choose "
                "another directory, or move the file away"
            )
    return folder
