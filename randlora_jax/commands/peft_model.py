"""An adapter opened by PyTorch PEFT: one side of what `verify` compares."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from randlora_jax.commands.torch_model import bare_model, in_short, quiet, stand_in
from randlora_jax.interop.config import ALL_LINEAR
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.keys import PREFIX, trained_tensors
from randlora_jax.interop.numpy_delta import Deltas


class PeftTwin:
    """An adapter in PyTorch PEFT, in evaluation mode, in float32 once it is loaded.

    Attributes:
      model: the PeftModel, of the base model or of bare layers.
      bare: of layers with the base model's names and shapes, and nothing else.
      refused: what PEFT has against the adapter on the base model; "" for nothing.
    """

    def __init__(self, directory: str | Path, deltas: Deltas, model: Any) -> None:
        """Open an adapter.

        Args:
          directory: the adapter's.
          deltas: what we make of it.
          model: the base model in PyTorch, which PEFT will change; or None.

        Raises:
          AdapterFileError: PEFT cannot even open it on bare layers.
        """
        folder = str(Path(directory).resolve())
        self.refused = ""
        self.bare = model is None
        with quiet():
            if model is not None:
                try:
                    self.model = _opened(model, folder, deltas)
                except Exception as error:
                    self.refused = f"on {type(model).__name__}: {in_short(error)}"
                    self.bare = True
            if self.bare:
                try:
                    bare = bare_model(deltas.layers.values())
                    self.model = _opened(bare, folder, deltas, _layers_alone(folder, deltas))
                except Exception as error:
                    raise AdapterFileError(
                        f"{directory}: PEFT cannot open it, not even on layers without a model "
                        f"({in_short(error)})"
                    ) from error

    @property
    def layers(self) -> Mapping[str, Any]:
        """The modules that PEFT adapted, by the base model's names."""
        return {
            name.removeprefix(PREFIX): module
            for name, module in self.model.named_modules()
            if hasattr(module, "randlora_lambda")
        }

    @staticmethod
    def delta(layer: Any) -> np.ndarray:
        """delta_W of one of `layers`, (out, in) in float32."""
        found = _numpy(layer.get_delta_weight("default"))
        return found.T if layer.fan_in_fan_out else found

    @contextmanager
    def merged(self) -> Iterator[Any]:
        """`model` with the adapter in its weights meanwhile, as PEFT merges it."""
        with quiet():
            self.model.merge_adapter()
        try:
            yield self.model
        finally:
            self.model.unmerge_adapter()

    def saved(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """What it has of these parameters of the base model; of two copies the trained one."""
        state = self.model.state_dict().items()
        found = trained_tensors({key.removeprefix(PREFIX): value for key, value in state})
        return {key: _numpy(value) for key, value in found.items() if key in keys}


def _opened(model: Any, folder: str, deltas: Deltas, config: Any = None) -> Any:
    import peft

    modules = [model.get_submodule(name) for name in deltas.layers]
    weights = [module.weight for module in modules]
    if deltas.draw is not None:  # PEFT rounds the bases that it draws to the dtype of the weights
        for module, weight in zip(modules, weights, strict=True):
            module.weight = stand_in(weight.shape, str(deltas.draw.base_dtype))
    found = peft.PeftModel.from_pretrained(model, folder, config=config)
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
    return found.float().eval()


def _layers_alone(folder: str, deltas: Deltas) -> Any:
    """The adapter's configuration less what needs a model around its layers."""
    import peft

    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.bias = None, None, "none"
    if deltas.adapter.config.target_modules in (None, ALL_LINEAR):
        config.target_modules = list(deltas.layers)
        config.layers_to_transform = config.layers_pattern = None
    return config


def _numpy(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().numpy()
    return found
