"""Which weights are stored (in, out): those of transformers' Conv1D, where a Linear's is (out, in).

Nothing in a file says so. A weight that is not square tells it by its bias, which is as long as
out. A square one is of the kind that its neighbours in the same stack of layers are, as every GPT-2
has a ``c_attn`` that is not square; and of such a kind only where config.json names a model, as a
whole or as one of its parts, that is known to have Conv1D. (The ``fan_in_fan_out`` of an adapter is
one flag for all its layers and says nothing of one.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# The model types whose linear layers of these names are Conv1D. All else in transformers is Linear;
# GPT-Neo's c_fc, for example.
TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
NAMES = {"c_attn", "q_attn", "c_fc", "c_proj"}


def is_conv1d(key: str, shapes: Shapes, config: Mapping[str, Any]) -> bool | None:
    """Whether a weight is stored (in, out); None if that cannot be told.

    Args:
      key: of the weight in the checkpoint.
      shapes: of all tensors of the checkpoint, by their keys.
      config: config.json.
    """
    told = _by_bias(key, shapes)
    if told is not None:
        return told
    name = _leaf(key)
    if name not in NAMES:
        return False
    known = _has_conv1d(key, config)
    neighbours = {_by_bias(other, shapes) for other in _stack(key, shapes)} - {None}
    if neighbours == {True}:
        return True if known else None
    if neighbours:
        return False if neighbours == {False} else None
    return known


def _by_bias(key: str, shapes: Shapes) -> bool | None:
    rows, columns = shapes[key]
    bias = shapes.get(f"{key.removesuffix('weight')}bias")
    if rows == columns or bias not in {(rows,), (columns,)}:
        return None
    return bias == (columns,)


def _leaf(key: str) -> str:
    return key.split(".")[-2] if "." in key else ""


def _stack(key: str, shapes: Shapes) -> Iterator[str]:
    """The weights that Conv1D could have, in all layers of the stack that `key` lies in."""
    match = re.match(r"(?:.*\.)?\d+\.", key)
    layers = re.compile(re.sub(r"\\?\d+", r"\\d+", re.escape(match[0])) if match else "")
    for other, shape in shapes.items():
        is_matrix = len(shape) == 2 and other.endswith(".weight")
        if is_matrix and _leaf(other) in NAMES and layers.match(other):
            yield other


def _has_conv1d(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the part of the model that `key` lies in has Conv1D, as far as config.json tells."""
    part, own = config, None
    for name in key.split("."):  # an encoder-decoder has one configuration for each
        inner = part.get(name)
        if isinstance(inner, dict) and "model_type" in inner:
            part, own = inner, str(inner["model_type"])
    if own is not None:
        return own in TYPES
    return not TYPES.isdisjoint(_types(config))


def _types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model types of a configuration and all its parts."""
    yield str(config.get("model_type"))
    for part in config.values():
        if isinstance(part, dict):
            yield from _types(part)
