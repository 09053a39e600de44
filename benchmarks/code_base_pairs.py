"""Other people's models beside their twins in PyTorch: an adapter of random numbers, taken there.

    python benchmarks/code_base_pairs.py --from FOLDER [NAME...]

FOLDER holds checkouts of the code bases, as for code_bases.py; NAME picks pairs, such as
``"bonsai, ViT"``. Both sides get the same small random weights: the twin's through the code base's
own loader where it has one, else ours by the names and layouts that the library knows. Prints the
largest difference of the outputs, as a share of the largest, without an adapter and with it.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers
from code_bases import BASES, Wrapped, code_base
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict
from small_models import bonsai, deepmind_gemma, maxtext
from small_models.entry import Entry

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.models.peft_layout import to_peft_layout

SETTINGS = {"r": 3, "randlora_alpha": 6, "target_modules": "all-linear"}
TEXT = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Pair:
    """A small model and its twin.

    Args:
      torch_class: of the twin, in transformers.
      config: of the twin.
      inputs: (ours, by name) -> the twin's.
      load: the code base's own loader, a folder -> a model; None where it has none.
      output: of the twin, that is compared.
    """

    entry: Entry
    torch_class: str
    config: transformers.PretrainedConfig
    inputs: Callable[[dict[str, Any]], dict[str, Any]] = field(
        default=lambda ours: {"input_ids": ours["tokens"]}
    )
    load: Callable[[str], nnx.Module] | None = None
    output: str = "logits"


def _bonsai_loader(package, function, config, **said):
    def load(folder):
        params = importlib.import_module(f"bonsai.models.{package}.params")
        return getattr(params, function)(folder, config, **said)

    return load


def bonsai_qwen3():
    config = transformers.Qwen3Config(**TEXT, rope_theta=1e6, tie_word_embeddings=False)
    load = _bonsai_loader("qwen3", "create_model_from_safe_tensors", bonsai.qwen3_config())
    return Pair(bonsai.qwen3(), "Qwen3ForCausalLM", config, load=load)


def bonsai_gemma3():
    text = {
        **TEXT,
        "layer_types": LOCAL_AND_GLOBAL,
        "sliding_window": 64,
        "query_pre_attn_scalar": 12,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**VISION, "vision_use_head": False}, mm_tokens_per_image=4, image_token_index=60
    )

    def inputs(ours):
        seen = ours["kinds"] == 1
        return {
            "input_ids": np.where(seen, 60, ours["tokens"]),
            "token_type_ids": ours["kinds"],
            "pixel_values": ours["images"].transpose(0, 3, 1, 2),
        }

    entry = bonsai.gemma3()
    load = _bonsai_loader("gemma3", "create_gemma3_from_pretrained", entry.model.config)
    return Pair(entry, "Gemma3ForConditionalGeneration", config, inputs, load)


def bonsai_vit(**changes):
    config = transformers.ViTConfig(**VISION, num_labels=5, **changes)
    load = _bonsai_loader("vit", "create_vit_from_pretrained", bonsai.vit_config())

    def inputs(ours):
        return {"pixel_values": ours["images"].transpose(0, 3, 1, 2)}

    return Pair(bonsai.vit(), "ViTForImageClassification", config, inputs, load)


def bonsai_dinov3():
    config = transformers.DINOv3ViTConfig(
        **VISION, use_gated_mlp=True, hidden_act="silu", num_register_tokens=4
    )
    entry = bonsai.dinov3()
    load = _bonsai_loader("dinov3", "create_model_from_safe_tensors", entry.model.config)

    def inputs(ours):
        return {"pixel_values": ours["images"]}

    return Pair(entry, "DINOv3ViTModel", config, inputs, load, "last_hidden_state")


def bonsai_vjepa2():
    config = transformers.VJEPA2Config(
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        crop_size=32,
        frames_per_clip=4,
        num_pooler_layers=1,
        num_labels=5,
    )
    entry = bonsai.vjepa2()
    load = _bonsai_loader(
        "vjepa2", "create_model_from_safe_tensors", entry.model.config, classifier=True
    )

    def inputs(ours):
        return {"pixel_values_videos": ours["video"].transpose(0, 1, 4, 2, 3)}

    return Pair(entry, "VJEPA2ForVideoClassification", config, inputs, load)


def gemma():
    config = transformers.GemmaConfig(**{**TEXT, "num_key_value_heads": 4})
    return Pair(deepmind_gemma.gemma(), "GemmaForCausalLM", config)


def gemma2():
    config = transformers.Gemma2Config(
        **TEXT,
        layer_types=LOCAL_AND_GLOBAL,
        sliding_window=64,
        query_pre_attn_scalar=12,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    return Pair(deepmind_gemma.gemma2(), "Gemma2ForCausalLM", config)


def gemma3():
    config = transformers.Gemma3TextConfig(
        **TEXT,
        layer_types=LOCAL_AND_GLOBAL,
        sliding_window=64,
        query_pre_attn_scalar=12,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    entry = deepmind_gemma.gemma3(global_base_frequency=1_000_000, global_scale_factor=8.0)
    return Pair(entry, "Gemma3ForCausalLM", config)


MAXTEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


def maxtext_qwen2(**changes):
    # three layers: as many as there are key heads, and a bias does not tell which axis is which
    said = {"decoder_block": "qwen2", "attention_bias": True, "base_num_decoder_layers": 3}
    sizes = {name: size for name, size in MAXTEXT.items() if name != "head_dim"}
    config = transformers.Qwen2Config(**{**sizes, "num_hidden_layers": 3})
    return Pair(maxtext.entry(as_nnx=True, **said, **changes), "Qwen2ForCausalLM", config)


def maxtext_qwen3(kind="nnx", **changes):
    entry = maxtext.entry(**maxtext.KINDS[kind], **maxtext.QWEN, **changes)
    return Pair(entry, "Qwen3ForCausalLM", transformers.Qwen3Config(**MAXTEXT))


def maxtext_experts(**changes):
    config = transformers.Qwen3MoeConfig(
        **MAXTEXT,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
    )
    entry = maxtext.entry(as_nnx=True, **maxtext.QWEN_MOE, norm_topk_prob=True, **changes)
    return Pair(entry, "Qwen3MoeForCausalLM", config)


PAIRS: dict[str, Callable[[], Pair]] = {
    "bonsai, Qwen 3": bonsai_qwen3,
    "bonsai, Gemma 3 with vision": bonsai_gemma3,
    "bonsai, ViT": bonsai_vit,
    "bonsai, ViT; the twin's gelu by tanh": lambda: bonsai_vit(hidden_act="gelu_pytorch_tanh"),
    "bonsai, DINOv3": bonsai_dinov3,
    "bonsai, V-JEPA 2": bonsai_vjepa2,
    "DeepMind gemma, Gemma": gemma,
    "DeepMind gemma, Gemma 2": gemma2,
    "DeepMind gemma, Gemma 3": gemma3,
    "MaxText, Qwen 2, scanned": maxtext_qwen2,
    "MaxText, Qwen 2, not scanned": lambda: maxtext_qwen2(scan_layers=False),
    "MaxText, Qwen 3, scanned": maxtext_qwen3,
    "MaxText, Qwen 3, not scanned": lambda: maxtext_qwen3(scan_layers=False),
    "MaxText, Qwen 3, scanned, nnx in linen": lambda: maxtext_qwen3("nnx in linen"),
    "MaxText, Qwen 3, scanned, linen": lambda: maxtext_qwen3("linen"),
    "MaxText, Qwen 3, experts, scanned": maxtext_experts,
    "MaxText, Qwen 3, experts, not scanned": lambda: maxtext_experts(scan_layers=False),
}


def base_arrays(model) -> dict[tuple, jax.Array]:
    """A base model's own parameters, by path."""
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {path: leaf.get_raw_value() for path, leaf in flat}
    return flatten_dict(meta.unbox(model.unbind()[1]["params"]))


def torch_arrays(value, path, registry) -> dict[str, np.ndarray]:
    """Ours at `path` by PyTorch key."""
    if path[-1] == "scale" and value.ndim == 2:  # MaxText's scanned norms: (features, layers)
        names = registry.names.of(path[:-1], value.shape[1:])
        return {f"{name}.weight": x for name, x in zip(names, np.asarray(value).T, strict=True)}
    return to_peft_layout(value, path, registry.layer_of(path), registry.names)


def fill(twin, arrays, registry) -> None:
    """Puts our parameters into the twin, every one of its, under the names that are known."""
    state = {}
    for path, value in arrays.items():
        for key, array in torch_arrays(value, path, registry).items():
            state[key] = torch.tensor(array)
    differing = set(state) ^ {name for name, _ in twin.named_parameters()}
    if differing:
        raise ValueError(f"parameters of one side alone: {sorted(differing)}")
    twin.load_state_dict(state, strict=False)
    twin.tie_weights()


def shaken(trained):
    """Random lambda and gamma."""
    draws = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: x + 0.1 * draws.standard_normal(x.shape).astype(x.dtype), trained
    )


def far(ours, theirs) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def made(pair, folder) -> tuple[torch.nn.Module, Wrapped]:
    """The twin, and ours wrapped, with the same weights."""
    pair.config._attn_implementation = "eager"
    twin = getattr(transformers, pair.torch_class)(pair.config).eval()
    model = pair.entry.model
    if pair.load:
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.1 * torch.randn_like(p))
        twin.save_pretrained(folder)
        model = pair.load(folder)
    arrays = base_arrays(model)
    config, said = pair.entry.stated()
    config = RandLoraConfig(**{**SETTINGS, **config})
    wrapped = Wrapped(pair.entry, get_peft_model(model, config, **said))
    if not pair.load:
        fill(twin, arrays, wrapped.model._registry)
    return twin, wrapped


def compared(pair) -> tuple[float, float, float]:
    """How far ours is from the twin, alone and with an adapter saved here; how far that moves it.

    The last as a share of the outputs' standard deviation.
    """
    given = {name: np.asarray(x) for name, x in pair.entry.inputs.items()}
    inputs = {name: torch.tensor(np.asarray(x)) for name, x in pair.inputs(given).items()}
    inputs = {n: x if x.is_floating_point() else x.long() for n, x in inputs.items()}

    def logits(model):
        with torch.no_grad():
            return model(**inputs)[pair.output].numpy()

    with tempfile.TemporaryDirectory() as folder:
        twin, wrapped = made(pair, f"{folder}/base")
        before = wrapped.output()
        alone = far(before, logits(twin))
        wrapped.put(shaken(wrapped.trained()))
        after = wrapped.output()
        wrapped.model.save_pretrained(f"{folder}/adapter")
        opened = peft.PeftModel.from_pretrained(twin, f"{folder}/adapter").eval()
        return alone, far(after, logits(opened)), float((after - before).std() / before.std())


def main() -> None:
    """Compares each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    sys.path[:0] = [
        str(args.folder.resolve() / path) for key in BASES for path in code_base(key).paths
    ]
    print("| model | twin | unadapted | ours in PEFT | the adapter moves it by |\n" + "|---" * 5 + "|")
    for name in args.names or PAIRS:
        torch.manual_seed(0)
        pair = PAIRS[name]()
        alone, adapted, moves = compared(pair)
        cells = f"{alone:.1e} | {adapted:.1e} | {moves:.2g} std"
        print(f"| {name} | {pair.torch_class} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
