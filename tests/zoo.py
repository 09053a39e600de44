"""Hugging Face's Flax families, each small and random, beside its PyTorch twin."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
import torch
import transformers as hf

RNG = np.random.default_rng(3)
IDS = RNG.integers(3, 97, (3, 11))
PIXELS = RNG.normal(size=(12, 3, 30, 30)).astype(np.float32)
TEXT = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
PAIR = {**TEXT, "decoder_input_ids": RNG.integers(3, 97, (3, 7))}
IMAGE = {"pixel_values": PIXELS}

# The same size under the names that different configurations give it.
WIDTHS = {"vocab_size": 97, "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
ENCODER = {**WIDTHS, "intermediate_size": 52, "max_position_embeddings": 40}
LLAMA = {**ENCODER, "num_key_value_heads": 1, "head_dim": 12}
VISION = {
    **{k: v for k, v in WIDTHS.items() if k != "vocab_size"},
    "intermediate_size": 52,
    "image_size": 30,
    "patch_size": 6,
}
BART = {
    "vocab_size": 97,
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "max_position_embeddings": 40,
}
T5 = {
    "vocab_size": 97,
    "d_model": 36,
    "d_kv": 12,
    "d_ff": 52,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
      torch_class: its PyTorch class; Flax's has "Flax" before it.
      make: the configuration.
      kind: text, encoder-decoder, vision or speech.
      inputs: of both models.
      output: the name of the output that is compared.
      left_out: linear layers that are not adapted.
      tied: linear layers of PyTorch that have no kernel in Flax: tied output heads.
    """

    torch_class: str
    make: Callable[[], hf.PretrainedConfig]
    kind: str = "text"
    inputs: dict = field(default_factory=lambda: TEXT)
    output: str = "logits"
    tied: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def _seq2seq(name: str, **more) -> Family:
    config = getattr(hf, f"{name}Config")
    kind = {"kind": "encoder-decoder", "inputs": PAIR, "tied": ("lm_head",)}
    head = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    return Family(f"{name}{head}", lambda: config(**BART, **more), **kind)


def _encoder(name: str, **more) -> Family:
    config = getattr(hf, f"{name}Config")
    return Family(
        f"{name}ForSequenceClassification", lambda: config(**{**ENCODER, **more, "num_labels": 3})
    )


def _t5(name: str, **more) -> Family:
    config = getattr(hf, f"{name}Config")
    kind = {"kind": "encoder-decoder", "inputs": PAIR}
    return Family(f"{name}ForConditionalGeneration", lambda: config(**T5, **more), **kind)


def _text_pair() -> hf.PretrainedConfig:
    return hf.EncoderDecoderConfig.from_encoder_decoder_configs(
        hf.BertConfig(**ENCODER), hf.GPT2Config(**GPT2), decoder_start_token_id=1
    )


def _image_pair() -> hf.PretrainedConfig:
    return hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**VISION), hf.GPT2Config(**GPT2), decoder_start_token_id=1
    )


GPT2 = {"vocab_size": 97, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 40, "n_inner": 52}

FAMILIES = {
    "albert": _encoder("Albert", embedding_size=20),
    "bart": _seq2seq("Bart"),
    "beit": Family(
        "BeitForImageClassification", lambda: hf.BeitConfig(**VISION, num_labels=3), "vision", IMAGE
    ),
    "bert": _encoder("Bert"),
    "big_bird": _encoder("BigBird", attention_type="original_full"),
    "blenderbot": _seq2seq("Blenderbot"),
    "blenderbot_small": _seq2seq("BlenderbotSmall"),
    "bloom": Family(
        "BloomForCausalLM",
        lambda: hf.BloomConfig(vocab_size=97, hidden_size=36, n_layer=2, n_head=4),
        tied=("lm_head",),
    ),
    "clip": Family(
        "CLIPModel",
        lambda: hf.CLIPConfig(text_config=ENCODER, vision_config=VISION, projection_dim=20),
        "vision",
        {**TEXT, **IMAGE},
        "logits_per_image",
    ),
    "dinov2": Family(
        "Dinov2ForImageClassification",
        lambda: hf.Dinov2Config(**VISION, mlp_ratio=2, num_labels=3),
        "vision",
        IMAGE,
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        lambda: hf.DistilBertConfig(
            vocab_size=97, dim=36, n_layers=2, n_heads=3, hidden_dim=52, max_position_embeddings=40
        ),
    ),
    "electra": replace(
        _encoder("Electra", embedding_size=20),
        inputs={**TEXT, "token_type_ids": np.zeros_like(IDS)},
    ),
    "encoder-decoder": Family(
        "EncoderDecoderModel", _text_pair, "encoder-decoder", PAIR, tied=("decoder.lm_head",)
    ),
    "gemma": Family(
        "GemmaForCausalLM", lambda: hf.GemmaConfig(**LLAMA, rope_theta=1e4), tied=("lm_head",)
    ),
    "gpt2": Family("GPT2LMHeadModel", lambda: hf.GPT2Config(**GPT2), tied=("lm_head",)),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(
            vocab_size=97,
            hidden_size=36,
            num_layers=2,
            num_heads=3,
            intermediate_size=52,
            max_position_embeddings=40,
            attention_types=[[["global", "local"], 1]],
        ),
        tied=("lm_head",),
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        lambda: hf.GPTJConfig(
            **{k: v for k, v in GPT2.items() if k != "n_inner"}, n_inner=52, rotary_dim=4
        ),
    ),
    "llama": Family("LlamaForCausalLM", lambda: hf.LlamaConfig(**LLAMA)),
    "longt5": _t5(
        "LongT5", encoder_attention_type="local", local_radius=4, tie_word_embeddings=False
    ),
    "marian": _seq2seq("Marian", pad_token_id=1),
    "mbart": _seq2seq("MBart"),
    "mistral": Family("MistralForCausalLM", lambda: hf.MistralConfig(**LLAMA, sliding_window=64)),
    "mt5": _t5("MT5"),
    "opt": Family(
        "OPTForCausalLM",
        lambda: hf.OPTConfig(
            **WIDTHS, ffn_dim=52, max_position_embeddings=40, word_embed_proj_dim=20
        ),
        tied=("lm_head",),
    ),
    "pegasus": _seq2seq("Pegasus"),
    "regnet": Family(
        "RegNetForImageClassification",
        lambda: hf.RegNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, num_labels=3
        ),
        "vision",
        IMAGE,
    ),
    "resnet": Family(
        "ResNetForImageClassification",
        lambda: hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
        ),
        "vision",
        IMAGE,
    ),
    "roberta": _encoder("Roberta"),
    "roberta_prelayernorm": _encoder("RobertaPreLayerNorm"),
    "roformer": _encoder("RoFormer"),
    "speech-encoder-decoder": Family(
        "SpeechEncoderDecoderModel",
        lambda: hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            _wav2vec2(), hf.GPT2Config(**{**GPT2, "n_positions": 200}), decoder_start_token_id=1
        ),
        "speech",
        {
            "inputs": RNG.normal(size=(2, 800)).astype(np.float32),
            "decoder_input_ids": IDS[:2],
        },
        tied=("decoder.lm_head",),
    ),
    "t5": _t5("T5", tie_word_embeddings=False),
    "vision-encoder-decoder": Family(
        "VisionEncoderDecoderModel",
        _image_pair,
        "vision",
        {**IMAGE, "decoder_input_ids": np.tile(IDS, (4, 1))},
        tied=("decoder.lm_head",),
    ),
    "vision-text-dual-encoder": Family(
        "VisionTextDualEncoderModel",
        lambda: hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**VISION), hf.BertConfig(**ENCODER), projection_dim=20
        ),
        "vision",
        {**TEXT, **IMAGE},
        "logits_per_image",
    ),
    "vit": Family(
        "ViTForImageClassification", lambda: hf.ViTConfig(**VISION, num_labels=3), "vision", IMAGE
    ),
    "wav2vec2": Family(
        "Wav2Vec2ForCTC",
        lambda: _wav2vec2(),
        "speech",
        {"input_values": RNG.normal(size=(2, 800)).astype(np.float32)},
        left_out=("lm_head",),
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(
            **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
            num_mel_bins=16,
            max_source_positions=20,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        "speech",
        {
            "input_features": RNG.normal(size=(2, 16, 40)).astype(np.float32),
            "decoder_input_ids": IDS[:2],
        },
        tied=("proj_out",),
    ),
    "xglm": Family(
        "XGLMForCausalLM",
        lambda: hf.XGLMConfig(
            vocab_size=97,
            d_model=36,
            num_layers=2,
            attention_heads=3,
            ffn_dim=52,
            max_position_embeddings=40,
        ),
        tied=("lm_head",),
    ),
    "xlm-roberta": _encoder("XLMRoberta"),
}


def _wav2vec2() -> hf.PretrainedConfig:
    return hf.Wav2Vec2Config(
        **{k: v for k, v in ENCODER.items() if k != "max_position_embeddings"},
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )


@dataclass
class Twins:
    """A family's model in both frameworks, with equal weights."""

    family: Family
    flax: object
    torch: object
    path: str

    def torch_output(self, model) -> np.ndarray:
        inputs = {k: torch.tensor(v) for k, v in self.family.inputs.items()}
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            return getattr(model.eval()(**inputs), self.family.output).float().numpy()

    def flax_output(self, model) -> np.ndarray:
        inputs = {k: jnp.asarray(v) for k, v in self.family.inputs.items()}
        return np.asarray(getattr(model(**inputs), self.family.output), np.float32)

    def in_bfloat16(self) -> tuple[object, object]:
        """The models in Flax and in PyTorch, weights and arithmetic in bfloat16."""
        name = self.family.torch_class
        kind = getattr(hf, f"Flax{name}")
        flax = kind.from_pretrained(self.path, from_pt=True, dtype=jnp.bfloat16)
        flax.params = flax.to_bf16(flax.params)
        low = {"attn_implementation": "eager", "dtype": torch.bfloat16}
        return flax, getattr(hf, name).from_pretrained(self.path, **low).eval()

    def torch_layers(self) -> dict[str, tuple[int, int]]:
        return torch_layers(self.torch)


def torch_layers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, hf.pytorch_utils.Conv1D):
            found[name] = tuple(module.weight.shape)
    return found


def mend_clip() -> None:
    """Let jnp.clip take the names of its limits that Flax's T5 still uses."""
    clip = jnp.clip
    if "a_max" not in inspect.signature(clip).parameters:
        names = {"a_min": "min", "a_max": "max"}
        jnp.clip = lambda *args, **named: clip(*args, **{names.get(k, k): named[k] for k in named})


def twins(name: str, folder) -> Twins:
    """Both models, the weights drawn by PyTorch and saved in `folder`."""
    family = FAMILIES[name]
    kind = getattr(hf, family.torch_class)
    torch.manual_seed(7)
    config = family.make()
    config._attn_implementation = "eager"
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and scales as training leaves them
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    flax = getattr(hf, f"Flax{family.torch_class}").from_pretrained(folder, from_pt=True)
    return Twins(family, flax, model, str(folder))
