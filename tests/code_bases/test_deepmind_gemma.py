"""DeepMind's gemma: the equation first, two kernels of a feed-forward, all of it under nn.jit."""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rebuilt import IDS, bound, check, known_as


class GemmaEinsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight_name, nn.initializers.normal(0.5), self.shape)
        )


class GemmaAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = GemmaEinsum((4, 8, 2), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = GemmaEinsum((2, 2, 8, 2), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        return GemmaEinsum((4, 2, 8), name="attn_vec_einsum")("BTNH,NHD->BTD", mixed)


class GemmaFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = GemmaEinsum((2, 12, 8), weight_name="gating_einsum")
        nn.share_scope(self, gating)
        gate = gating("...F,NHF->...NH", x)
        linear = GemmaEinsum((12, 8), weight_name="linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class GemmaBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + GemmaAttention(name="attn")(x)
        return x + GemmaFeedForward(name="mlp")(x)


class GemmaConfig:
    use_qk_norm = use_post_attn_norm = transpose_gating_einsum = True


@known_as("gemma.gm.nn._transformer.Transformer")
class Gemma(nn.Module):
    config: Any = GemmaConfig

    @nn.jit
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 8, name="embedder")(ids)
        for i in range(2):
            x = GemmaBlock(name=f"layer_{i}")(x)
        return x


def test_deepmind_gemma(tmp_path):
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    check(lambda: bound(Gemma(), IDS), (IDS,), names, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["base_model_class"] == "Gemma3ForCausalLM"
