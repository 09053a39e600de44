"""A checkpoint's tensors by the names that an adapter's model has.

`BaseModel.find` goes from an adapter's names to a checkpoint's. This is the way back, for what the
adapter has no tensors of: it is named like what lies beside it and was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.base_model import FLOATS, BaseModel
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.expert_stacks import apart
from randlora_jax.interop.keys import trained_tensors
from randlora_jax.interop.promises import BaseNames, kind

# How the names of transformers' classes end, by PEFT's tasks.
_CLASSES = {
    "SEQ_CLS": ("ForSequenceClassification",),
    "TOKEN_CLS": ("ForTokenClassification",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"),
    "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
}
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"),
    *("encoder_layers", "decoder_layers", "num_decoder_layers"),
)
_NUMBERED = re.compile(r"(?P<block>(?:[^.]+\.)*?)(?P<index>\d+)\.")


def base_names(base: BaseModel, adapter: Adapter) -> BaseNames:
    """What `promises.check` is to know of a checkpoint; `base.layers(adapter)` came before."""
    trained = trained_tensors(adapter.saved)
    ours = [*trained, *(f"{name}.weight" for name in adapter.layers)]
    found = {key: theirs for key in ours if (theirs := base.find(key)) is not None}
    begins = dict(_beginnings(theirs, key) for key, theirs in found.items())
    experts = any(map(_is_expert, adapter.layers))
    rest = {*base.home, *(base.in_stacks if experts else ())} - set(found.values())
    rest -= {base.find(key) for key in apart(trained, base.config)[0]}  # one tensor in the adapter
    named = found | {_renamed(theirs, begins): theirs for theirs in rest}
    blocks = {_block(name) for name in adapter.layers} - {None}
    depths = _depths(base.config)
    axes = {
        key: _axes(base, theirs)
        for key, theirs in named.items()
        if not (_block(key) in blocks and _index(key) >= max(depths, default=float("inf")))
    }
    tensors = {
        key
        for key, count in axes.items()  # GPT-2's files hold masks called bias, of four axes
        if key.endswith(".weight") or (key.endswith(".bias") and count == 1)
    }
    is_whole = _is_of_the_class(base.config, adapter.config)

    def is_layer(name: str) -> bool:
        # Else its class may lack what the checkpoint has, such as a decoder or a head, but for
        # layers of a kind in which others are adapted; and may have all experts in one tensor, as
        # transformers 5 has them.
        return (is_whole or _block(name) in blocks) and experts >= _is_expert(name)

    # Its class may not read all that a checkpoint was once saved with, but surely what is like the
    # adapter's own or in a block of it, up to the end: of the depths that are stated, which may be
    # of several parts, the first beyond the adapter's last layer.
    last = _last(ours)
    modules = {kind(_module(key)) for key in ours}

    def is_doubtful(key: str) -> bool:
        block = _block(key)
        beyond = any(last.get(block, -1) < end <= _index(key) for end in depths)
        return beyond or not (block in blocks or kind(_module(key)) in modules)

    matrices = {key.removesuffix(".weight") for key in tensors if axes[key] == 2}
    doubtful = set(filter(is_doubtful, tensors))
    return BaseNames(tensors, set(filter(is_layer, matrices)), is_whole, doubtful)


def _axes(base: BaseModel, key: str) -> int:
    """How many axes a tensor of floats has, or a matrix in one; 0 for other tensors."""
    part = base.in_stacks.get(key)
    tensor = base.tensor(part.key if part else key)
    return (2 if part else len(tensor.shape)) if tensor.dtype in FLOATS else 0


def _beginnings(theirs: str, ours: str) -> tuple[str, str]:
    """Two names of one tensor less what they have in common at the end."""
    a, b = theirs.split("."), ours.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join([*a, ""]), ".".join([*b, ""])


def _renamed(theirs: str, begins: Mapping[str, str]) -> str:
    """A name with the longest beginning replaced that is known; as it is where none is."""
    known = max((x for x in begins if theirs.startswith(x)), key=len, default=None)
    return theirs if known is None else begins[known] + theirs[len(known) :]


def _block(name: str) -> str | None:
    """What comes before the first number of a name, such as ``model.layers.``."""
    match = _NUMBERED.match(name)
    return match["block"] if match else None


def _index(name: str) -> int:
    match = _NUMBERED.match(name)
    return int(match["index"]) if match else 0


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _last(keys: Iterable[str]) -> dict[str | None, int]:
    """The highest number in each block."""
    numbers: dict[str | None, int] = {}
    for key in keys:
        numbers[_block(key)] = max(_index(key), numbers.get(_block(key), 0))
    return numbers


def _depths(config: Mapping[str, Any]) -> list[int]:
    """How many layers the parts of a model's class have, as far as is stated.

    Files of DeepSeek-V3 and GLM-4 have one more, to predict several tokens with, that no class
    reads.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return [part[name] for part in parts for name in _DEPTHS if type(part.get(name)) is int]


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _is_of_the_class(found: Mapping[str, Any], config: RandLoraConfig) -> bool:
    """Whether a checkpoint is of the class that the adapter was trained on."""
    classes = found.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    stated = (config.auto_mapping or {}).get("base_model_class")
    ends = _CLASSES.get(config.task_type or "", ())
    return name != "" and (name == stated or name.endswith(ends))
