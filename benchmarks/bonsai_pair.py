"""bonsai's Qwen 3 and ViT beside their twins in PyTorch: an adapter of random numbers, taken there.

    python benchmarks/bonsai_pair.py --from FOLDER     FOLDER: with a checkout of bonsai

The twin's small random weights go through bonsai's own loader. Prints the largest difference of the
outputs, as a share of the largest, without an adapter and with it.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from code_bases import shaken
from flax import nnx
from small_models import bonsai
from small_models.entry import ids, normal

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model


def qwen3():
    """(the twin, its inputs, a loader of ours from a folder, the entry)."""
    config = transformers.Qwen3Config(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rope_theta=1e6,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    inputs = {"input_ids": torch.tensor(np.asarray(ids()), dtype=torch.long)}

    def load(folder):
        params = importlib.import_module("bonsai.models.qwen3.params")
        return params.create_model_from_safe_tensors(folder, bonsai.qwen3_config())

    return transformers.Qwen3ForCausalLM(config), inputs, load, bonsai.qwen3()


def vit():
    """As `qwen3`."""
    config = transformers.ViTConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=5,
        attn_implementation="eager",
    )
    images = torch.tensor(np.asarray(normal(2, 16, 16, 3))).permute(0, 3, 1, 2)

    def load(folder):
        params = importlib.import_module("bonsai.models.vit.params")
        return params.create_vit_from_pretrained(folder, bonsai.vit_config())

    return (
        transformers.ViTForImageClassification(config),
        {"pixel_values": images},
        load,
        bonsai.vit(),
    )


def far(ours, theirs) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def compared(make) -> tuple[float, float]:
    """How far ours is from the twin: alone, and with an adapter that was saved here."""
    twin, inputs, load, entry = make()
    twin.eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def logits(model):
        with torch.no_grad():
            return model(**inputs).logits.numpy()

    settings = {"r": 3, "randlora_alpha": 6, "target_modules": "all-linear"}
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(f"{folder}/base")
        model = get_peft_model(load(f"{folder}/base"), RandLoraConfig(**settings))
        ours = tuple(entry.inputs.values())
        alone = far(entry.call(model, *ours), logits(twin))
        nnx.update(model, shaken(nnx.state(model, AdapterParam)))
        model.save_pretrained(f"{folder}/adapter")
        opened = peft.PeftModel.from_pretrained(twin, f"{folder}/adapter").eval()
        return alone, far(entry.call(model, *ours), logits(opened))


def main() -> None:
    """Compares each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    sys.path.insert(0, str(parser.parse_args().folder.resolve() / "bonsai"))
    torch.manual_seed(0)
    for make in (qwen3, vit):
        print(f"{make.__name__}: unadapted %.1e, ours in PEFT %.1e" % compared(make), flush=True)


if __name__ == "__main__":
    main()
