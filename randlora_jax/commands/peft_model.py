"""An adapter opened by PyTorch PEFT, and the Flax twin of its base model: what `verify` compares.

The one module that uses PyTorch, PEFT and transformers, and only once a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from randlora_jax.commands.merge_plan import HEAD
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.keys import PREFIX, trained_tensors

_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


class PeftTwin:
    """An adapter in PyTorch PEFT, in evaluation mode, in float32 once it is loaded.

    Attributes:
      model: the PeftModel.
      flax: the Hugging Face Flax model with the base model's weights, or None.
      why_not: why there is none.
      inputs: a row of random tokens, where there is a Flax model.
      before: the base model's logits for them.
    """

    def __init__(self, adapter: Adapter, directory: str | Path, base: str | Path) -> None:
        import peft

        # PEFT casts bases that it draws to the base model's own dtype
        dtype = "auto" if adapter.bases is None else "float32"
        loaded = _base_class(adapter.config, base).from_pretrained(
            base, torch_dtype=dtype, **_labels(adapter)
        )
        stored = loaded.dtype
        self.flax, self.why_not = _flax_twin(loaded)
        if self.flax is not None:
            self.inputs = _inputs(loaded.config)
            self.before = _first_output(loaded.float().eval(), self.inputs)
            loaded.to(stored)
            # no number changes, since they come from there; we draw bases in this dtype, too
            narrow = {"torch.bfloat16": "to_bf16", "torch.float16": "to_fp16"}.get(str(stored))
            if narrow:
                self.flax.params = getattr(self.flax, narrow)(self.flax.params)
        self.model = peft.PeftModel.from_pretrained(loaded, directory).float().eval()

    def deltas(self) -> dict[str, np.ndarray]:
        """delta_W of every layer that PEFT adapted, (out, in) in float32."""
        found = {}
        for name, module in self.model.named_modules():
            if hasattr(module, "randlora_lambda"):
                delta = _numpy(module.get_delta_weight("default"))
                delta = delta.T if module.fan_in_fan_out else delta
                found[name.removeprefix(PREFIX)] = delta
        return found

    def saved(self) -> dict[str, np.ndarray]:
        """Every other parameter, by the base model's state-dict keys; the trained copy of two."""
        state = self.model.state_dict().items()
        return trained_tensors({key.removeprefix(PREFIX): _numpy(x) for key, x in state})

    def logits(self) -> np.ndarray:
        """What the adapted model makes of `inputs`."""
        return _first_output(self.model, self.inputs)


def _inputs(config: Any) -> dict[str, np.ndarray]:
    text = config.get_text_config()
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (1, length))
    found = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return found | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _first_output(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return _numpy(model(**{name: torch.from_numpy(x) for name, x in inputs.items()})[0])


def _base_class(config: RandLoraConfig, base: str | Path) -> Any:
    """The class the adapter was trained on, as far as its config or the base model's tells."""
    import transformers

    if config.task_type in _TASKS:
        return getattr(transformers, _TASKS[config.task_type])
    mapping = config.auto_mapping or {}
    library = str(mapping.get("parent_library"))
    if library.startswith("transformers.models."):  # a file must not choose what is imported
        return getattr(import_module(library), str(mapping["base_model_class"]))
    architectures = transformers.AutoConfig.from_pretrained(base).architectures or ["AutoModel"]
    return getattr(transformers, architectures[0])


def _labels(adapter: Adapter) -> dict[str, int]:
    heads = [
        len(value) for key, value in trained_tensors(adapter.saved).items() if HEAD.search(key)
    ]
    classifies = adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    return {"num_labels": heads[-1]} if heads and classifies else {}


def _flax_twin(model: Any) -> tuple[Any, str]:
    """The Flax model with the weights of a PyTorch one; or None, and the reason."""
    import transformers

    name = f"Flax{type(model).__name__}"
    if model.main_input_name != "input_ids":
        return None, f"{name} takes no text"
    try:
        kind = getattr(transformers, name)
    except (AttributeError, ImportError):
        return None, f"transformers {transformers.__version__} has no {name}"
    with TemporaryDirectory() as folder:
        state = {key: value.float() for key, value in model.state_dict().items()}
        model.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
        try:
            return kind.from_pretrained(folder, from_pt=True), ""
        except Exception as error:  # whatever is wrong with it, it is not the adapter
            return None, f"{name} cannot be loaded ({error})"


def _numpy(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().numpy()
    return found
