"""The Hugging Face hub: adapters by repository id, from its cache when offline, and back to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, listed, shown
from randlora_jax.interop.peft_dir import PICKLE_NAME, WEIGHTS_NAME

CARD_NAME = "README.md"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def local_directory(
    source: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The directory of an adapter: `source` itself, or a snapshot of the hub repository it names.

    ``huggingface_hub`` keeps snapshots in its cache, and with ``HF_HUB_OFFLINE=1`` uses nothing
    else.

    Args:
      source: a directory, or a repository id such as "me/my-adapter".
      revision: branch, tag or commit of the repository.
      subfolder: where in it the adapter lies, if not at its root, such as "checkpoint-20".

    Raises:
      AdapterFileError: there is no such directory, and the hub has no such repository or cannot be
        reached; or it has no such subfolder, or no safetensors there.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        raise AdapterFileError(
            f"expected a directory or the id of a hub repository, found {shown(source)}"
        )
    inside = _inside(subfolder)
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise AdapterFileError(
                f"revision={revision!r}: {folder} is a directory, which has none; leave it out, or "
                "give a hub repository id"
            )
        return _there(folder, inside)
    if isinstance(source, Path) or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise AdapterFileError(
            f"no folder '{source}' here ({Path.cwd()}): expected a directory with an adapter"
        )
    hub = _hub(f"no folder {source!r} here ({Path.cwd()})")
    try:
        found = hub.snapshot_download(
            source,
            revision=revision,
            allow_patterns=[(inside / name).as_posix() for name in FILE_NAMES],
        )
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, ValueError) as error:
        raise AdapterFileError(
            f"no folder {source!r} here ({Path.cwd()}), nor does the hub give a repository of this "
            f"id (revision {revision or 'main'}): {error}"
        ) from None  # its own causes are a hundred lines that say no more
    fetched = _there(Path(found), inside)
    if (fetched / CONFIG_NAME).exists() and not (fetched / WEIGHTS_NAME).exists():
        raise AdapterFileError(
            f"{source}: expected {WEIGHTS_NAME} beside {CONFIG_NAME}, found none. A pickle, "
            f"{PICKLE_NAME}, is not fetched; if the repository has one: hf download {source} "
            "--local-dir my-adapter, and open my-adapter, which tells how to convert it"
        )
    return fetched


def _inside(subfolder: str | None) -> Path:
    """`subfolder` as a path that stays where it begins."""
    if subfolder is None:
        return Path()
    if isinstance(subfolder, str) and subfolder.strip():
        inside = Path(subfolder)
        if not inside.is_absolute() and ".." not in inside.parts:
            return inside
    raise AdapterFileError(
        f"subfolder: expected the name of a folder inside, such as 'checkpoint-20', found "
        f"{shown(subfolder)}"
    )


def _there(folder: Path, inside: Path) -> Path:
    if (folder / inside).is_dir():
        return folder / inside
    below = sorted(path.parent.relative_to(folder) for path in folder.glob(f"*/{CONFIG_NAME}"))
    has = (
        f"adapters are in {listed([*map(str, below)])}" if below else "it has none with an adapter"
    )
    raise AdapterFileError(f"{folder} has no subfolder {str(inside)!r}; {has}")


def push(directory: Path, repo_id: str, **options: Any) -> str:
    """Uploads an adapter directory in one commit; the repository is made if it does not exist.

    Args:
      options: of ``HfApi.create_repo`` (private, token) and ``HfApi.upload_folder`` (revision,
        commit_message, token).

    Returns:
      the address of the commit.
    """
    api = _hub("uploading").HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, private=options.pop("private", None))
    return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **options))


def model_card(config: RandLoraConfig, layers: int, numbers: int) -> str:
    """A model card for an adapter: what it is, and how each side opens it."""
    base = config.base_model_name_or_path
    head = [f"base_model: {json.dumps(base)}"] if base else []
    head += ["library_name: peft", "tags: [randlora, jax, flax]"]
    return f"""\
---
{chr(10).join(head)}
---

# RandLoRA adapter

A RandLoRA adapter (rank {config.r}, alpha {config.randlora_alpha}) of {layers} layers with \
{numbers:,} trained numbers{f" for `{base}`" if base else ""}, written by randlora-jax in the \
format of PyTorch PEFT.

```python
# PyTorch
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "this repository")

# JAX; names=, views= and layer_types= as they were given when it was made
from randlora_jax import RandLoraModel
model = RandLoraModel.from_pretrained(base_model, "this repository")
```
"""


def _hub(why: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise AdapterFileError(
            f"{why}: the hub needs huggingface_hub, which is not installed: "
            "pip install '.[hub]' in a clone of randlora-jax"
        ) from error
    return huggingface_hub
