"""What is known of a model class, so that its users need not say it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from randlora_jax.models.layer_types import Table
from randlora_jax.models.names import Rules
from randlora_jax.models.registry import BaseModelInfo


@dataclass(frozen=True)
class KnownModel:
    """What users would else state themselves: see `get_peft_model`.

    Args:
      info: what PEFT records of the PyTorch twin.
      differs: what the model computes otherwise than its config says, and so than the twin.
    """

    names: Rules = field(default_factory=dict)
    layouts: Mapping[str, str] = field(default_factory=dict)
    layer_types: Table = field(default_factory=dict)
    info: BaseModelInfo = field(default_factory=BaseModelInfo)
    differs: str = ""


# By the full name of a model's class; where its config decides, how to tell.
Entries = Mapping[str, KnownModel | Callable[[Any], KnownModel]]


def twin(
    torch_class: str,
    package: str,
    model_type: str = "",
    *,
    head: bool = True,
    same_paths: bool = False,
    tied: tuple[str, str] = ("model.embed_tokens", "lm_head"),
) -> BaseModelInfo:
    """Of the class `torch_class` in ``transformers.models.<package>``.

    Args:
      model_type: PEFT's word for the family, where it is not the package's name.
      head: it has an output embedding, which "all-linear" leaves out.
      same_paths: where no rule names a module, its path is the twin's.
      tied: the twin's input and output embedding, which share a weight where the model has but one.
    """
    return BaseModelInfo(
        model_type=model_type or package,
        auto_mapping={
            "base_model_class": torch_class,
            "parent_library": f"transformers.models.{package}.modeling_{package}",
        },
        has_output_head=head,
        has_torch_paths=same_paths,
        tied=(tied,) if head else (),
    )
