"""What the program that compares needs to know of a model and its twin in PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers
from flax import nnx

from small_models.entry import Entry

TEXT = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Pair:
    """A small model and its twin.

    Args:
      torch_class: of the twin, in transformers.
      config: of the twin.
      inputs: (ours, by name) -> the twin's.
      load: the code base's own loader, a folder -> a model; None where it has none.
      output: of the twin, that is compared.
    """

    entry: Entry
    torch_class: str
    config: transformers.PretrainedConfig
    inputs: Callable[[dict[str, Any]], dict[str, Any]] = field(
        default=lambda ours: {"input_ids": ours["tokens"]}
    )
    load: Callable[[str], nnx.Module] | None = None
    output: str = "logits"
