"""The Flax twin of a PyTorch model, and what both make of some tokens: how `verify` gets logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from randlora_jax.commands.torch_model import NotCompared, in_short, quiet
from randlora_jax.interop.torch_rng import TorchDraw


class FlaxTwin:
    """The Hugging Face Flax model with the weights of a PyTorch one.

    Attributes:
      name: of its class.
      theirs: logits of a row of tokens from the PyTorch model.
      ours: from this one.
    """

    def __init__(self, model: Any) -> None:
        """Make the twin of `model`, and run both.

        Raises:
          NotCompared: there is no such class, or one of the two does not run on tokens.
        """
        kind = type(model).__name__
        self.name = f"Flax{kind}"
        with quiet():
            self._flax = self._with_weights_of(model)
            try:
                self._inputs = _tokens(model.config)
                self.theirs = self.logits_of(model)
            except Exception as error:
                raise NotCompared(f"{kind} does not run on tokens ({in_short(error)})") from error
            try:
                self.ours = self._run(self._flax)
            except Exception as error:  # without any adapter, so it says nothing about this one
                raise NotCompared(f"{self.name} fails ({in_short(error)})") from error

    def logits_of(self, model: Any) -> np.ndarray:
        """What a PyTorch model makes of the tokens."""
        import torch

        inputs = {name: torch.from_numpy(x) for name, x in self._inputs.items()}
        with torch.no_grad():
            found: np.ndarray = model(**inputs)[0].float().numpy()
        return found

    def adapted(self, directory: str | Path, draw: TorchDraw | None) -> np.ndarray:
        """Logits of this model with the adapter in `directory`.

        Args:
          draw: how to draw bases that the adapter lacks.

        Raises:
          NotCompared: the model lacks something that the adapter changes, such as biases.
        """
        from randlora_jax import RandLoraModel

        how: dict[str, Any] = {}
        if draw is not None:
            how = {"torch_generation": draw.generation, "base_dtype": draw.base_dtype}
        try:
            with quiet():  # whatever the files give to warn of was said when they were read
                model = RandLoraModel.from_pretrained(self._flax, directory, **how)
                return self._run(model)
        except Exception as error:
            raise NotCompared(f"{self.name} does not take it ({in_short(error)})") from error

    def _with_weights_of(self, model: Any) -> Any:
        import transformers

        if model.main_input_name != "input_ids":
            raise NotCompared(f"{type(model).__name__} takes {model.main_input_name}, no tokens")
        try:
            kind = getattr(transformers, self.name)
        except (AttributeError, ImportError) as error:
            raise NotCompared(_no_class(self.name, transformers.__version__)) from error
        with TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder, max_shard_size="1000GB")
                return kind.from_pretrained(folder, from_pt=True, local_files_only=True)
            except Exception as error:
                raise NotCompared(f"{self.name} cannot be loaded ({in_short(error)})") from error

    def _run(self, model: Any) -> np.ndarray:
        import jax

        with jax.default_matmul_precision("highest"):
            return np.asarray(model(**self._inputs)[0], np.float32)


def _no_class(name: str, release: str) -> str:
    """Why there is no Flax class of this name, and what to do about it."""
    reason = f"transformers {release} has no {name}"
    if int(release.split(".")[0]) < 5:
        return reason
    return (
        f"{reason}, nor any Flax model. If docs/models.md lists the model, 4.57 has its class: pip "
        "install '.[hf]' in a clone of randlora-jax (best in a virtual environment of its own). If "
        "not, as of google-tunix's models, compare the logits as examples/with_tunix.py does"
    )


def _tokens(config: Any) -> Mapping[str, np.ndarray]:
    text = config.get_text_config()
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (1, length))
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end  # where some classifiers look, as Bart's
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return found | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
