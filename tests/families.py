"""Small models of real architectures in pairs: Hugging Face's Flax class and its PyTorch twin."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers


@dataclass
class Twins:
    flax: object
    torch: object
    inputs: dict
    path: str

    def torch_logits(self, model=None):
        model = model or self.torch
        with torch.no_grad():
            return model(**{k: torch.tensor(v) for k, v in self.inputs.items()}).logits.numpy()

    def flax_logits(self, model=None, **kwargs):
        return np.asarray((model or self.flax)(**self.inputs, **kwargs).logits)


WIDTHS = {"vocab_size": 97, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}

# family: (class name without Flax, config, targets that mix square, wide and tall layers)
FAMILIES = {
    "opt": (
        "OPTForCausalLM",
        lambda: transformers.OPTConfig(
            **WIDTHS,
            ffn_dim=60,
            max_position_embeddings=40,
            word_embed_proj_dim=36,
            dropout=0.0,
        ),
        ["q_proj", "k_proj", "v_proj"],
    ),
    "bert": (
        "BertForSequenceClassification",
        lambda: transformers.BertConfig(
            **WIDTHS, intermediate_size=52, max_position_embeddings=40, num_labels=3
        ),
        r"bert\.encoder\..*\.(query|key|value|dense)",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            vocab_size=97, n_embd=36, n_layer=2, n_head=3, n_positions=40, n_inner=52
        ),
        ["c_attn", "c_proj", "c_fc"],
    ),
    "llama": (
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            **WIDTHS,
            intermediate_size=52,
            num_key_value_heads=1,
            max_position_embeddings=40,
            attn_implementation="eager",
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}


def twins(family: str, folder) -> Twins:
    """Both models with the same random weights, saved by PyTorch in `folder`."""
    name, make, _ = FAMILIES[family]
    torch.manual_seed(7)
    config = make()
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(folder)
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    flax = getattr(transformers, f"Flax{name}").from_pretrained(folder, from_pt=True)
    ids = np.random.default_rng(3).integers(3, 97, (4, 11))
    return Twins(flax, model, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, str(folder))
