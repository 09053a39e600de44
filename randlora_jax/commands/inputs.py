"""What every command takes that forms delta_W: an adapter and its base model."""

from __future__ import annotations

import argparse
from pathlib import Path

from randlora_jax.commands.report import Misuse, adapter_directory, model_directory, progress
from randlora_jax.interop import promises
from randlora_jax.interop.adapter import BASE_DTYPES, Adapter
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.base_names import base_names
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.numpy_delta import Deltas
from randlora_jax.interop.peft_dir import read_files
from randlora_jax.interop.torch_rng import Generation


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments DIR and --base, and those of `add_draw`."""
    parser.add_argument("dir", metavar="DIR", type=adapter_directory, help="adapter directory")
    parser.add_argument(
        "--base",
        metavar="MODEL_DIR",
        type=model_directory,
        required=True,
        help="directory of the base model, in safetensors",
    )
    add_draw(parser)


def add_draw(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments that say how PyTorch drew bases: those of an adapter without them."""
    parser.add_argument(
        "--torch-generation",
        metavar="GENERATION",
        choices=[str(generation) for generation in Generation],
        help="how PyTorch drew the bases of an adapter that was saved without them: "
        + ", ".join(Generation),
    )
    parser.add_argument(
        "--base-dtype",
        metavar="DTYPE",
        choices=list(map(str, BASE_DTYPES)),
        help="the dtype that the base model of such an adapter was loaded in for training, if it "
        "is not the one it is stored in: " + ", ".join(map(str, BASE_DTYPES)),
    )


def deltas_of(
    adapter: Adapter,
    base: BaseModel,
    generation: str | None = None,
    base_dtype: str | None = None,
) -> Deltas:
    """As `Deltas`, with a progress bar where bases must be drawn, and all promises checked.

    Raises:
      AdapterFileError: the adapter lacks what its config promises of this base model.
      Misuse: `generation` or `base_dtype` is given for an adapter that has its bases.
    """
    keeping_promises(adapter, "the adapter", base)
    try:
        return Deltas(adapter, base, generation, progress, base_dtype=base_dtype)
    except ConfigError as error:
        raise Misuse(str(error)) from error


def keeping_promises(adapter: Adapter, where: object, base: BaseModel | None) -> Adapter:
    """As `promises.check`, with what a base model's directory tells, if one is given.

    Raises:
      AdapterFileError: the adapter lacks what its config promises.
      TargetError: the base model has other layers.
    """
    if base is None:
        return promises.check(adapter, where, None)
    base.layers(adapter)  # settles how the adapter's names become the checkpoint's
    return promises.check(adapter, where, base_names(base, adapter))


def read_showing_progress(directory: str | Path) -> Adapter:
    """As `peft_dir.read_files`, with a progress bar where it takes long."""
    return read_files(directory, progress)
