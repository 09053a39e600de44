"""A tiny Llama 3 in google-tunix, for its trainers, and its twin in PyTorch; text for both.

Tests that import this are skipped where tunix cannot be imported whole.
"""

import contextlib
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model


@contextlib.contextmanager
def with_tunix():
    """Within, flax is as tunix sets it for the process, whose other tests want it as it was."""
    before = getattr(flax.config, "flax_always_shard_variable", None)
    try:
        if before is not None:
            flax.config.update("flax_always_shard_variable", False)
        yield
    finally:
        if before is not None:
            flax.config.update("flax_always_shard_variable", before)


with with_tunix():
    pytest.importorskip(
        "tunix", reason="google-tunix's trainers are not here", exc_type=ImportError
    )
    from tunix.models.llama3 import model as llama3
    from tunix.models.llama3 import params
    from tunix_pair import jax_logits, sizes, torch_logits, with_rope

TOKENIZER = transformers.ByT5Tokenizer()  # a token a byte, which needs no file
WIDTHS = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 1}
HUGGING_FACE = with_rope(
    transformers.LlamaConfig, 1e6, **WIDTHS, tie_word_embeddings=False, rms_norm_eps=1e-5
)
TUNIX = llama3.ModelConfig(
    **sizes(HUGGING_FACE), vocab_size=len(TOKENIZER), rope_theta=1_000_000, norm_eps=1e-5
)
SETTINGS = {"r": 6, "randlora_alpha": 24, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def checkpoint(folder: Path, config: transformers.LlamaConfig = HUGGING_FACE) -> Path:
    """Of a Llama with random weights, as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.std() if p.ndim > 1 else 1))
    model.save_pretrained(folder)
    return folder


def base_model(
    folder: Path, mesh: Mesh | None = None, shape: llama3.ModelConfig = TUNIX
) -> llama3.Llama3:
    """tunix's model of that checkpoint."""
    return params.create_model_from_safe_tensors(str(folder), shape, mesh, dtype=jnp.float32)


def adapted(folder: Path, mesh: Mesh | None = None, **settings):
    """That model with an adapter that trains, beside another one that must stay as it is."""
    config = RandLoraConfig(**SETTINGS | settings, base_model_name_or_path=str(folder))
    model = get_peft_model(base_model(folder, mesh), config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    move(model)
    model.set_adapter("default")
    return model


def move(model, seed: int = 0) -> None:
    """Lets what trains be as if it had been trained."""
    trained = nnx.state(model, AdapterParam)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    on_mesh = [jax.device_put(x + n, x.sharding) for x, n in zip(leaves, noise, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, on_mesh))


def leaves(model) -> dict[tuple, np.ndarray]:
    """Every array of a model, by path."""
    return {path: np.array(x) for path, x in nnx.to_flat_state(nnx.state(model))}


def is_default(path: tuple) -> bool:
    """Whether a leaf is one of the adapter that trains."""
    return "default" in path


def only_the_adapter_moved(before: dict, model) -> None:
    """All leaves of the adapter that trains moved, and no bit of any other."""
    after = leaves(model)
    assert before.keys() == after.keys()
    moved = {path for path, x in after.items() if x.tobytes() != before[path].tobytes()}
    assert moved == set(filter(is_default, after)) != set()


def in_peft(model, to: Path) -> peft.PeftModelForCausalLM:
    """The adapter, saved and opened in PyTorch PEFT."""
    model.save_pretrained(to)
    return peft.AutoPeftModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()


def opens_in_peft(model, to: Path) -> None:
    """The adapter computes in PyTorch PEFT what it computes here, and that is something."""
    theirs = in_peft(model, to)
    ours, expected = np.asarray(jax_logits(model)), torch_logits(theirs)
    with theirs.disable_adapter():
        base = torch_logits(theirs)
    assert np.std(expected - base) >= 0.1 * np.std(base), "the adapter hardly moves the logits"
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
