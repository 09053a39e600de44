"""The base model in PyTorch, where transformers has its class.

Left to itself, transformers runs Python files of a model's directory if a user at the terminal says
yes, follows an adapter that lies there to another model, and asks the hub for what it misses. So it
is shown a folder that holds the weights which `BaseModel` found, their configuration, and nothing
else.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from randlora_jax.commands.merge_plan import HEAD
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.base_model import MODEL_CONFIG, BaseLayer, BaseModel
from randlora_jax.interop.checkpoint_files import INDEX, SINGLE
from randlora_jax.interop.errors import listed, shown
from randlora_jax.interop.keys import trained_tensors

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}

# Fields of config.json, of the whole model or a part, by which transformers takes code, weights or
# attention kernels from elsewhere.
_LEFT_OUT = {"auto_map", "transformers_weights", "attn_implementation", "_attn_implementation"}
_ANOTHER_MODEL = "backbone"  # the field by which it loads a part of the model from the hub


class NotCompared(Exception):
    """Something cannot be compared, for a reason that is not the adapter's fault."""


def open_model(base: BaseModel, adapter: Adapter, layers: Mapping[str, BaseLayer]) -> Any:
    """The class that an adapter was trained on, with the base model's weights in float32.

    Args:
      layers: the adapter's, as the base model has them.

    Returns:
      the model, in evaluation mode.

    Raises:
      NotCompared: transformers has no class for it, or none with all the adapter's layers.
    """
    if _names_another(base.config):
        raise NotCompared(
            f"its {MODEL_CONFIG} has a part of the model loaded from elsewhere ({_ANOTHER_MODEL})"
        )
    why = []
    with quiet(), TemporaryDirectory() as folder:
        _lay_out(base, Path(folder))
        for library, name in _classes(adapter, base.config):
            try:
                model = _class(library, name).from_pretrained(
                    folder,
                    torch_dtype="float32",
                    attn_implementation="eager",
                    local_files_only=True,
                    trust_remote_code=False,
                    **_labels(adapter),
                )
                lacking = [key for key, layer in layers.items() if not _has(model, key, layer)]
            except Exception as error:  # whatever transformers says, it is not about the adapter
                why.append(f"{name}: {in_short(error)}")
                continue
            if not lacking:
                return model.eval()
            why.append(f"{name} has no linear layer {listed(lacking, 1)}")
    if not _is_typed(base.config):
        why.append(f"model_type {shown(base.config.get('model_type'))} is unknown")
    if "auto_map" in base.config:
        why.append("code that comes with a model is never run")
    raise NotCompared(f"transformers does not open the base model ({'; '.join(why)})")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and PEFT from writing warnings and progress to the terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def in_short(error: Exception) -> str:
    """What kind of error it is, and the beginning of what it says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _lay_out(base: BaseModel, folder: Path) -> None:
    """Fill a folder with what transformers may see of a base model."""
    (folder / MODEL_CONFIG).write_text(json.dumps(_harmless(base.config)))
    single = len(base.files) == 1
    for name, file in base.files.items():
        (folder / (SINGLE if single else name)).symlink_to(file.path.resolve())
    if not single:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": base.home}))


def _harmless(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: _harmless(value) for key, value in config.items() if key not in _LEFT_OUT}


def _names_another(config: Any) -> bool:
    """Whether transformers would load a part of the model from the hub."""
    return isinstance(config, dict) and (
        isinstance(config.get(_ANOTHER_MODEL), str) or any(map(_names_another, config.values()))
    )


def _classes(adapter: Adapter, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The modules and names of classes that the adapter may have been trained on, likely first."""
    typed = _is_typed(config)
    if typed and adapter.config.task_type in _AUTO:
        yield "transformers", _AUTO[adapter.config.task_type]
    mapping = adapter.config.auto_mapping or {}
    library = str(mapping.get("parent_library"))
    if library.startswith("transformers.models."):  # a file must not choose what is imported
        yield library, str(mapping.get("base_model_class"))
    # transformers writes Qwen2-VL's into the part for text
    for part in (config, *config.values()):
        named = part.get("architectures") if isinstance(part, dict) else None
        for name in named if isinstance(named, list) else []:
            yield "transformers", str(name)
    if typed:
        yield "transformers", "AutoModel"


def _is_typed(config: Mapping[str, Any]) -> bool:
    """Whether transformers can tell the configuration's class, without guessing from the path."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _class(library: str, name: str) -> Any:
    """A model class of transformers.

    Raises:
      ImportError: there is none.
    """
    import transformers

    try:
        found = getattr(import_module(library), name)
    except AttributeError:
        found = None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not known and name not in ("AutoModel", *_AUTO.values()):
        raise ImportError(f"transformers {transformers.__version__} has no model {shown(name)}")
    return found


def _labels(adapter: Adapter) -> dict[str, int]:
    heads = [
        len(value) for key, value in trained_tensors(adapter.saved).items() if HEAD.search(key)
    ]
    classifies = adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    return {"num_labels": heads[-1]} if heads and classifies else {}


def _has(model: Any, name: str, layer: BaseLayer) -> bool:
    """Whether a model has a layer of that name that PEFT can adapt, with the checkpoint's shape."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return isinstance(module, Linear | Conv1D) and tuple(module.weight.shape) == layer.torch_shape


def bare_model(layers: Iterable[BaseLayer]) -> Any:
    """A PyTorch module that has these layers alone; their weights are zeros that take no memory."""
    from torch.nn import Linear, Module
    from transformers.pytorch_utils import Conv1D

    root = Module()
    for layer in layers:
        n_out, n_in = layer.shape
        linear = Conv1D(n_out, n_in) if layer.conv1d else Linear(n_in, n_out, bias=False)
        linear.weight = stand_in(layer.torch_shape, "float32")
        *path, leaf = layer.name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, linear)
    return root


def stand_in(shape: tuple[int, ...], dtype: str) -> Any:
    """A weight for a layer of which only the shape and the dtype matter."""
    import torch

    zero = torch.zeros((), dtype=getattr(torch, dtype))
    return torch.nn.Parameter(zero.expand(shape), requires_grad=False)
