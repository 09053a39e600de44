"""What merging an adapter does to a checkpoint: which tensors change, and what config.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from randlora_jax.interop import targets
from randlora_jax.interop.base_model import BaseModel
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import TargetError, shown
from randlora_jax.interop.expert_stacks import apart
from randlora_jax.interop.keys import biases_by_one_name, trained_tensors
from randlora_jax.interop.numpy_delta import Deltas

# The last layers of classifiers, whose rows are the labels.
HEAD = re.compile(
    r"(^|\.)(classifier|score|qa_outputs|logits_proj|(classifier|classification_head)\.out_proj)"
    r"\.weight$"
)
_DEFAULT_LABELS = 2  # of transformers, which leaves them out of config.json
_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
# Of classes and PEFT's tasks, those without an output layer over the vocabulary that goes in.
_HEADLESS_TASKS = {*_TASK_CLASSES, "FEATURE_EXTRACTION"}
_HEADLESS = re.compile(
    r"Classification|Regression|QuestionAnswering|MultipleChoice|NextSentence|Retrieval|Detection"
    r"|CTC|MaskedImageModeling"
    r"|WithProjection|(?<!LMHead)(?<!DoubleHeads)(?<!EncoderDecoder)(?<!Chat)Model$"
)


@dataclass(frozen=True)
class MergePlan:
    """The changes, by the checkpoint's keys.

    Attributes:
      sums: ``{key: names of the layers}`` of weights to which delta_W is added: one layer's, or
        those of single experts that lie in one tensor.
      replaced: tensors that take the place of others of the same shape; before a sum is formed.
      added: tensors that the checkpoint lacks, as a head that was trained whole.
      renamed: ``{key: new key}`` of tensors that are otherwise as before or as said above.
      config: what changes in config.json.
    """

    sums: dict[str, list[str]]
    replaced: dict[str, np.ndarray]
    added: dict[str, np.ndarray]
    renamed: dict[str, str]
    config: dict[str, Any]


def plan(deltas: Deltas, base: BaseModel) -> MergePlan:
    """Plan a merge.

    Raises:
      TargetError: the adapter changes a tied weight, carries a tensor that the model has no place
        for, or has another number of labels than config.json.
    """
    adapter = deltas.adapter
    has_head = _has_head(base.config, adapter.config)
    for name, (lam, _) in adapter.layers.items():
        if lam.any():
            _refuse_tied(base, f"{name}.weight", base.tied(f"{name}.weight", has_head=has_head))
    sums: dict[str, list[str]] = {}
    for name, layer in deltas.layers.items():
        sums.setdefault(layer.stored.key, []).append(name)
    carried = trained_tensors(adapter.saved)
    carried = biases_by_one_name(carried, lambda key: base.find(key) is not None)
    trained = _as_apart(carried, base)
    replaced, added = {}, {}
    for key, value in trained.items():
        # what has no tensor of its own may use another's
        place = base.find(key) or base.tied(key, has_head=has_head)
        if place is None:
            _check_whole(base, key, adapter.config)
            added[key] = value
            continue
        _refuse_part(base, key, place, sums)
        if base.tensor(place).shape != value.shape:
            raise base.resized(place, base.tensor(place), value.shape)
        # PEFT writes embeddings that were not trained as well, both sides of tied ones
        if not np.array_equal(base.read(place), value):
            _refuse_tied(base, key, base.tied(key, has_head=has_head))
            replaced[place] = value
    config = _config_changes(base.config, adapter.config, added)
    # transformers puts the class's prefix before all names of a file or before none, so what goes
    # outside of it, as a head does, needs the prefix written out at all others.
    # (A model of several parts renames them by itself.)
    naming = base.names.naming
    outside = [key for key in added if not key.startswith(naming.strip)]
    if naming.strip and outside and "text_config" not in base.config:
        names = {*deltas.layers, *trained}
        renamed = {
            key: naming.strip + key
            for key in base.home
            if key.removesuffix(".weight") not in names and key not in names
        }
        return MergePlan(sums, replaced, added, renamed, config)
    as_stored = replace(naming, respelled=False)
    return MergePlan(sums, replaced, {as_stored(k): v for k, v in added.items()}, {}, config)


def _as_apart(trained: Mapping[str, np.ndarray], base: BaseModel) -> dict[str, np.ndarray]:
    """Experts trained whole, all in one tensor, as the checkpoint has them if each has its own."""
    missing = {key: x for key, x in trained.items() if base.find(key) is None}
    single, stacks = apart(missing, base.config)
    return {key: x for key, x in trained.items() if key not in stacks} | single


def _has_head(found: Mapping[str, Any], config: RandLoraConfig) -> bool:
    """Whether the adapted model makes logits over what goes in, and may tie two weights so."""
    if config.task_type is not None:
        return config.task_type not in _HEADLESS_TASKS
    classes = found.get("architectures")
    own = str(classes[0]) if isinstance(classes, list) and classes else ""
    return not _HEADLESS.search(str((config.auto_mapping or {}).get("base_model_class", own)))


def _refuse_tied(base: BaseModel, key: str, other: str | None) -> None:
    if other is not None:
        raise TargetError(
            f"{base.folder}: {shown(key)} shares its weight with {shown(other)} (tied word "
            "embeddings): merging would change that too, as it does in PEFT, and the model would "
            "compute something else than it does with its adapter. Keep the adapter apart, or "
            'save a base model with untied weights ("tie_word_embeddings": false)'
        )


def _refuse_part(base: BaseModel, key: str, place: str, sums: Mapping[str, list[str]]) -> None:
    """Refuse a module trained whole that lies in a tensor of several, or that has layers in it."""
    if place in base.in_stacks or (place in sums and len(base.tensor(place).shape) > 2):
        stack = base.in_stacks[place].key if place in base.in_stacks else place
        raise TargetError(
            f"{base.folder}: {shown(key)} was trained whole, beside others that {shown(stack)} of "
            "the checkpoint holds with it. Save the base model with its experts apart, as "
            "transformers 5 does too unless save_original_format is False"
        )


def _check_whole(base: BaseModel, key: str, config: RandLoraConfig) -> None:
    if ".experts." in key:
        raise TargetError(
            f"{base.folder} has no tensor {shown(key)}, which the adapter carries: it has fewer "
            "experts, or has them in tensors that are not known of model type "
            f"{base.config.get('model_type')!r}. Give the directory of the very model that was "
            "adapted"
        )
    if not targets.inside_saved(key.rpartition(".")[0], targets.saved_modules(config)):
        raise TargetError(
            f"{base.folder} has no tensor {shown(key)}, which the adapter carries, and it is in no "
            "module that was trained whole: another base model"
        )


def _config_changes(
    found: Mapping[str, Any], config: RandLoraConfig, added: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The labels and the class that a new head brings."""
    heads = [len(value) for key, value in added.items() if HEAD.search(key)]
    if not heads:
        return {}
    changes: dict[str, Any] = {}
    names = found.get("id2label")
    stated = len(names) if isinstance(names, dict) else found.get("num_labels")
    if stated not in (None, heads[-1]):
        raise TargetError(
            f"config.json of the base model has {stated} labels, the adapter's head {heads[-1]}. "
            "Set id2label and label2id there to the labels it was trained on"
        )
    if stated is None and heads[-1] != _DEFAULT_LABELS:
        labels = [f"LABEL_{i}" for i in range(heads[-1])]
        changes["id2label"] = {str(i): label for i, label in enumerate(labels)}
        changes["label2id"] = {label: i for i, label in enumerate(labels)}
    classes = found.get("architectures")
    old = str(classes[0]) if isinstance(classes, list) and classes else ""
    stem = re.sub(r"(LMHeadModel|Model|For[A-Z]\w*)$", "", old)
    new = (config.auto_mapping or {}).get("base_model_class")
    if config.task_type in _TASK_CLASSES and stem:
        new = stem + _TASK_CLASSES[config.task_type]
    return changes | ({"architectures": [new]} if new and new != old else {})
