"""RandLoRA fine-tuning for JAX models, in the file format of PyTorch PEFT.

`get_peft_model` wraps a model, `RandLoraConfig` says how, and `RandLoraModel.from_pretrained` opens
an adapter that this library or PyTorch PEFT saved. What they raise is a `RandLoraError`.
"""

import os.path

__version__ = "0.1.0.dev0"

# A clone has the folder interop/ beside this one, an installed package inside it. Python started in
# a clone finds this file there, whatever is installed.
_folder = os.path.dirname(__file__)
if not os.path.isdir(os.path.join(_folder, "interop")):
    __path__.append(os.path.dirname(_folder))

TYPE_CHECKING = False  # as in typing; next to nothing is imported here, see commands/main.py
if TYPE_CHECKING:
    from randlora_jax.core.contraction import Contraction as Contraction
    from randlora_jax.core.kernel_layout import KernelLayout as KernelLayout
    from randlora_jax.front_ends.nnx import AdapterParam as AdapterParam
    from randlora_jax.front_ends.nnx import FrozenAdapterParam as FrozenAdapterParam
    from randlora_jax.interop.config import RandLoraConfig as RandLoraConfig
    from randlora_jax.interop.errors import AdapterFileError as AdapterFileError
    from randlora_jax.interop.errors import ConfigError as ConfigError
    from randlora_jax.interop.errors import RandLoraError as RandLoraError
    from randlora_jax.interop.errors import TargetError as TargetError
    from randlora_jax.models.layer import LayerType as LayerType
    from randlora_jax.models.sample_inputs import SampleInputs as SampleInputs
    from randlora_jax.wrapping import RandLoraModel as RandLoraModel
    from randlora_jax.wrapping import get_peft_model as get_peft_model
    from randlora_jax.wrapping import register_front_end as register_front_end

# Imported when first asked for: the command line reads adapter files without loading jax.
_HOMES = {
    "RandLoraConfig": "interop.config",
    "AdapterFileError": "interop.errors",
    "ConfigError": "interop.errors",
    "RandLoraError": "interop.errors",
    "TargetError": "interop.errors",
    "RandLoraModel": "wrapping",
    "get_peft_model": "wrapping",
    "register_front_end": "wrapping",
    "LayerType": "models.layer",
    "SampleInputs": "models.sample_inputs",
    "KernelLayout": "core.kernel_layout",
    "Contraction": "core.contraction",
    "AdapterParam": "front_ends.nnx",
    "FrozenAdapterParam": "front_ends.nnx",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"randlora_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Public names, those that nobody has asked for yet among them: for completion and help()."""
    return sorted({*globals(), *__all__})
