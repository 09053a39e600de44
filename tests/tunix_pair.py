"""One google-tunix model and its Hugging Face twin in PyTorch: an adapter there and back.

    python tests/tunix_pair.py MODEL FOLDER    MODEL: one of MODELS below

tunix changes flax for the whole process, so this is a program of its own; it prints one line of
JSON with what it found. `tests/parity/test_tunix.py` checks it here, `make compat` in an
environment as tunix's own installation makes it, with transformers 5.
"""

import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model


def import_models_alone() -> None:
    """Let ``tunix.models`` be imported without the trainers that tunix itself imports first."""
    found = importlib.util.find_spec("tunix")
    package = types.ModuleType("tunix")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["tunix"] = package


try:
    import tunix  # noqa: F401
except ImportError:
    import_models_alone()

WIDTHS = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "attn_implementation": "eager",
    "max_position_embeddings": 64,
}
ROPE = 1e6  # fixed in tunix's Llama 3 and Qwen 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["out_proj", "fc1", "fc2"]


def sizes(config) -> dict:
    return {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def with_rope(kind, theta, scaling=None, **changes):
    """A config with one rope base, which transformers 4 and 5 spell differently."""
    rope = {"rope_theta": theta, "rope_scaling": scaling}
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}
    return kind(**{**WIDTHS, **changes, **rope})


def llama3(folder):
    from tunix.models.llama3 import model, params

    config = with_rope(transformers.LlamaConfig, ROPE, tie_word_embeddings=False)

    def load():
        ours = model.ModelConfig(
            **sizes(config), vocab_size=61, rope_theta=int(ROPE), norm_eps=config.rms_norm_eps
        )
        return params.create_model_from_safe_tensors(str(folder), ours, dtype=jnp.float32)

    return transformers.LlamaForCausalLM, config, load


def qwen2(folder):
    from tunix.models.qwen2 import model, params

    config = with_rope(transformers.Qwen2Config, ROPE, tie_word_embeddings=False)

    def load():
        ours = model.ModelConfig(
            **sizes(config), vocab_size=61, rope_theta=int(ROPE), norm_eps=config.rms_norm_eps
        )
        return params.create_model_from_safe_tensors(str(folder), ours, dtype=jnp.float32)

    return transformers.Qwen2ForCausalLM, config, load


def qwen3(folder):
    from tunix.models.qwen3 import model, params

    config = with_rope(transformers.Qwen3Config, ROPE, tie_word_embeddings=True)

    def load():
        ours = model.ModelConfig(
            **sizes(config),
            vocab_size=61,
            rope_theta=int(ROPE),
            norm_eps=config.rms_norm_eps,
            use_tied_embedding=True,
        )
        return params.create_model_from_safe_tensors(str(folder), ours, dtype=jnp.float32)

    return transformers.Qwen3ForCausalLM, config, load


def qwen3_moe(folder):
    """A mixture: three arrays for all experts, in PyTorch three layers for each."""
    from tunix.models.qwen3 import model, params

    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    config = with_rope(
        transformers.Qwen3MoeConfig,
        ROPE,
        **experts,
        moe_intermediate_size=52,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )

    def load():
        ours = model.ModelConfig(
            **sizes(config),
            **experts,
            vocab_size=61,
            rope_theta=int(ROPE),
            norm_eps=config.rms_norm_eps,
        )
        return params.create_model_from_safe_tensors(str(folder), ours, dtype=jnp.float32)

    return transformers.Qwen3MoeForCausalLM, config, load


def gemma1(folder):
    from tunix.models.gemma import model, params_safetensors

    config = with_rope(transformers.GemmaConfig, 1e4, hidden_activation="gelu_pytorch_tanh")

    def load():
        # tunix's loader reads Gemma 2's names alone, where this norm has another one
        norm = "post_attention_layernorm", "pre_feedforward_layernorm"
        renamed = {
            name.replace(*norm): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        with tempfile.TemporaryDirectory() as checkpoint:
            save_file(renamed, Path(checkpoint) / "model.safetensors")
            ours = model.ModelConfig(
                **sizes(config),
                num_embed=61,
                final_logit_softcap=None,
                use_post_attn_norm=False,
                use_post_ffw_norm=False,
                attention_types=(model.AttentionType.GLOBAL,) * 2,
            )
            return params_safetensors.create_model_from_safe_tensors(
                checkpoint, ours, dtype=jnp.float32
            )

    return transformers.GemmaForCausalLM, config, load


def gemma2(folder, kv_heads=2):
    from tunix.models.gemma import model, params_safetensors

    config = with_rope(
        transformers.Gemma2Config,
        1e4,
        num_key_value_heads=kv_heads,
        query_pre_attn_scalar=12,
        sliding_window=64,
    )

    def load():
        ours = model.ModelConfig(
            **sizes(config),
            num_embed=61,
            final_logit_softcap=config.final_logit_softcapping,
            attn_logits_soft_cap=config.attn_logit_softcapping,
            use_post_attn_norm=True,
            use_post_ffw_norm=True,
            attention_types=(model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL),
            sliding_window_size=64,
        )
        return params_safetensors.create_model_from_safe_tensors(
            str(folder), ours, dtype=jnp.float32
        )

    return transformers.Gemma2ForCausalLM, config, load


def gemma2_fused(folder):
    """As many key heads as query heads: one array for all three."""
    return gemma2(folder, kv_heads=4)


def gemma3(folder):
    from tunix.models.gemma3 import model, params_safetensors

    config = transformers.Gemma3TextConfig(
        **WIDTHS, query_pre_attn_scalar=12, sliding_window=64, layer_types=["sliding_attention"] * 2
    )

    def load():
        ours = model.ModelConfig(**sizes(config), num_embed=61, sliding_window_size=64)
        return params_safetensors.create_model_from_safe_tensors(
            str(folder), ours, dtype=jnp.float32
        )

    return transformers.Gemma3ForCausalLM, config, load


def gemma3_vision(folder):
    """Images among the tokens."""
    from tunix.models.gemma3 import model, params_safetensors, vision

    text = {**WIDTHS, "query_pre_attn_scalar": 12, "sliding_window": 64}
    seen = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    seen |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = transformers.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention"] * 2},
        vision_config={**seen, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        attn_implementation="eager",
    )

    def load():
        tower = vision.SigLIPConfig(
            num_mm_tokens_per_image_prepool=16,
            num_mm_tokens_per_image=4,
            image_height=16,
            image_width=16,
            patch_size=(4, 4),
            width=24,
            depth=2,
            mlp_dim=40,
            num_heads=2,
            soft_token_placeholder=IMAGE,
        )
        ours = model.ModelConfig(
            **sizes(config.text_config), num_embed=61, sliding_window_size=64, vision_config=tower
        )
        held = load_file(folder / "model.safetensors")
        (place,) = (name for name in held if "position_embedding" in name)
        with tempfile.TemporaryDirectory() as checkpoint:
            # tunix's loader looks for one more axis there than PyTorch has
            save_file({**held, place: held[place][None]}, Path(checkpoint) / "model.safetensors")
            return params_safetensors.create_model_from_safe_tensors(
                checkpoint, ours, dtype=jnp.float32
            )

    return transformers.Gemma3ForConditionalGeneration, config, load


MODELS = {
    f.__name__: f
    for f in (llama3, qwen2, qwen3, qwen3_moe, gemma1, gemma2, gemma2_fused, gemma3, gemma3_vision)
}
IDS = np.random.default_rng(0).integers(3, 61, (3, 9))
IMAGE = 60  # the token that stands for a part of an image
IMAGES = np.random.default_rng(1).standard_normal((3, 16, 16, 3)).astype(np.float32)
SEEN = (np.arange(9) >= 1) & (np.arange(9) < 5)  # where the image stands
SEEING_IDS = np.where(SEEN, IMAGE, np.minimum(IDS, IMAGE - 1))


def torch_logits(model) -> np.ndarray:
    inputs = {"input_ids": torch.tensor(IDS)}
    if hasattr(model.config, "vision_config"):
        inputs = {
            "input_ids": torch.tensor(SEEING_IDS),
            "pixel_values": torch.tensor(IMAGES).permute(0, 3, 1, 2),
            "token_type_ids": torch.tensor(np.broadcast_to(SEEN, IDS.shape).astype(int)),
        }
    with torch.no_grad():
        return model(**inputs).logits.float().numpy()


def jax_logits(model) -> jax.Array:
    length = IDS.shape[1]
    ids, mask, more = IDS, jnp.tril(jnp.ones((length, length), bool)), {}
    if getattr(model.config, "vision_config", None) is not None:
        ids, mask, more = SEEING_IDS, mask | jnp.outer(SEEN, SEEN), {"images": IMAGES[:, None]}
    positions = jnp.broadcast_to(jnp.arange(length), IDS.shape)
    mask = jnp.broadcast_to(mask, (len(IDS), length, length))
    return model(jnp.asarray(ids), positions, None, mask, **more)[0].astype(jnp.float32)


def load_torch(kind, folder):
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def deltas(peft_model) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("base_model.model."): m.get_delta_weight("default").detach().numpy()
        for name, m in peft_model.named_modules()
        if hasattr(m, "randlora_lambda")
    }


def largest(found, expected) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max())


def relative(ours: dict, theirs: dict) -> float:
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    # tunix stops the gradient behind the vision tower: what was trained here is still zero there
    return max(largest(ours[n], d) / (float(np.abs(d).max()) or 1) for n, d in theirs.items())


def train(model, steps: int) -> list[float]:
    """Learn to predict the next token of these few texts; the losses."""
    optimizer = nnx.Optimizer(model, optax.adam(5e-2), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = jax_logits(model)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def main(name: str, folder: Path) -> dict:
    kind, config, load = MODELS[name](folder / "base")
    torch.manual_seed(0)
    twin = kind(config).eval()
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.std() if p.ndim > 1 else 1))
    twin.save_pretrained(folder / "base")
    base = torch_logits(twin)
    scale = float(np.abs(base).max())
    plain = load()
    found = {"unadapted": largest(jax_logits(plain), base) / scale}
    allowed = max(1e-5, 2 * found["unadapted"])

    settings = {"r": 5, "randlora_alpha": 20, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if name == "gemma3_vision":
        settings |= {"target_modules": [*TARGETS, *TOWER], "task_type": None}
    ours = get_peft_model(
        plain, RandLoraConfig(**settings, base_model_name_or_path=str(folder / "base"))
    )
    found["unchanged"] = largest(jax_logits(ours), jax_logits(load()))
    losses = train(ours, 8)
    found |= {"first_loss": losses[0], "last_loss": losses[-1]}
    ours.save_pretrained(folder / "ours")
    opened = peft.PeftModel.from_pretrained(load_torch(kind, folder / "base"), folder / "ours")
    if kind.__name__.endswith("CausalLM"):
        opened = peft.AutoPeftModelForCausalLM.from_pretrained(
            folder / "ours", dtype=torch.float32, attn_implementation="eager"
        )
    opened.eval()
    expected = torch_logits(opened)
    found["ours_moves"] = float(np.std(expected - base) / np.std(base))
    found["ours_in_peft"] = largest(jax_logits(ours), expected) / scale
    found["delta_ours_in_peft"] = relative(ours.delta_weights(), deltas(opened))

    theirs = peft.get_peft_model(load_torch(kind, folder / "base"), peft.RandLoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "randlora_lambda" in key:
                p.normal_(0, 0.3)
            elif "randlora_gamma" in key:
                p.mul_(1 + 0.3 * torch.randn_like(p))
    theirs.eval().save_pretrained(folder / "theirs")
    expected = torch_logits(theirs)
    loaded = RandLoraModel.from_pretrained(load(), folder / "theirs")
    found["theirs_moves"] = float(np.std(expected - base) / np.std(base))
    found["theirs_here"] = largest(jax_logits(loaded), expected) / scale
    found["delta_theirs_here"] = relative(loaded.delta_weights(), deltas(theirs))
    return found | {"allowed": allowed, "transformers": transformers.__version__}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
