"""Single experts in a checkpoint that has all of a layer's in two tensors.

Classes of transformers 4 have a linear layer for each expert, and adapters name those. Classes of
transformers 5 have ``experts.gate_up_proj`` and ``experts.down_proj``, and so do files where the
model was saved with ``save_original_format=False`` or never had its experts apart:

    plain     gate_up (E, 2 I, H)   down (E, H, I)      an expert's slice is (out, in)
    turned    gate_up (E, H, 2 I)   down (E, I, H)      Llama 4, Qwen3-VL of transformers 4

Which of the two it is follows from the pair of shapes, whatever I and H are: down's last axis is
half of gate_up's first, or equal to it. What no shape tells is that gate comes first and up follows
whole (gpt-oss has their columns by turns); that is known by the type of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

# The types with both in halves, by what their classes with experts apart call gate, up and down:
# `conversion_mapping.py` of transformers 5.12 joins them so, or the class itself does.
_NAMES = {
    ("w1", "w3", "w2"): (
        "mixtral minimax minimax_m2 minimax_m3_vl phimoe lfm2_moe deepseek_v4"
    ),
    ("gate_proj", "up_proj", "down_proj"): (
        "afmoe cohere2_moe deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe "
        "exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe hy_v3 "
        "jamba laguna llama4 longcat_flash mellum mistral4 olmoe qwen2_moe qwen3_5_moe qwen3_moe "
        "qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker qwen3_vl_moe solar_open"
    ),
}  # fmt: skip
_BY_TYPE = {kind: names for names, kinds in _NAMES.items() for kind in kinds.split()}


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix that lies in a tensor of a checkpoint, or is one.

    Attributes:
      key: of that tensor.
      shape: (rows, columns), as they lie there.
      transposed: the rows are the inputs.
      row, column: where it begins in the tensor, all of whose axes but the last are taken as one.
    """

    key: str
    shape: tuple[int, int]
    transposed: bool
    row: int = 0
    column: int = 0


def expert_matrices(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, StoredMatrix]:
    """Every single expert's matrices, by the keys that a checkpoint with experts apart has.

    Args:
      shapes: of all tensors of the checkpoint, by their keys.
      config: config.json.
    """
    names = _names(config)
    found: dict[str, StoredMatrix] = {}
    for key, gate_up in shapes.items():
        head, _, leaf = key.rpartition(".")
        down = f"{head}.down_proj"
        if names and leaf == "gate_up_proj" and head.endswith("experts") and down in shapes:
            found |= _of_a_layer(head, names, gate_up, shapes[down])
    return found


def apart(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Single experts' matrices (out, in), by keys as above, and the keys of the stacks they are in.

    Args:
      tensors: any, stacks among them.
      config: config.json.
    """
    found, stacks = {}, set()
    for key, part in expert_matrices({key: x.shape for key, x in tensors.items()}, config).items():
        stack, (rows, columns) = tensors[part.key], part.shape
        flat = stack.reshape(-1, stack.shape[2])
        matrix = flat[part.row : part.row + rows, part.column : part.column + columns]
        found[key] = matrix.T if part.transposed else matrix
        stacks.add(part.key)
    return found, stacks


def _of_a_layer(
    head: str, names: tuple[str, str, str], gate_up: tuple[int, ...], down: tuple[int, ...]
) -> dict[str, StoredMatrix]:
    """The experts of one layer; none where the two shapes do not fit each other."""
    if not len(gate_up) == len(down) == 3 or gate_up[0] != down[0]:
        return {}
    count, rows, columns = gate_up
    plain = (rows, columns) == (2 * down[2], down[1])
    if not plain and (rows, columns) != (down[2], 2 * down[1]):
        return {}
    half = (rows // 2, columns) if plain else (rows, columns // 2)
    found = {}
    for expert in range(count):
        at = expert * rows
        up = (at + half[0], 0) if plain else (at, half[1])
        parts = (
            StoredMatrix(f"{head}.gate_up_proj", half, not plain, at),
            StoredMatrix(f"{head}.gate_up_proj", half, not plain, *up),
            StoredMatrix(f"{head}.down_proj", (down[1], down[2]), not plain, expert * down[1]),
        )
        for name, part in zip(names, parts, strict=True):
            found[f"{head}.{expert}.{name}.weight"] = part
    return found


def _names(config: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What a model's experts call gate, up and down; None if its type is not known to have them."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    kinds = [str(part.get("model_type")).removesuffix("_text") for part in parts]
    return next((_BY_TYPE[kind] for kind in kinds if kind in _BY_TYPE), None)
