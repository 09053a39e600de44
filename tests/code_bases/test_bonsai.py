"""jax-ml/bonsai: flax's own layers, in a module of the twin's structure."""

import jax
from flax import nnx
from rebuilt import IDS, check, known_as


class BonsaiAttention(nnx.Module):
    def __init__(self, rngs):
        for name in "qkvo":
            setattr(self, f"{name}_proj", nnx.Linear(8, 8, use_bias=False, rngs=rngs))
        self.q_norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        q, k, v = self.q_norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        return self.o_proj(jax.nn.softmax(q @ k.mT) @ v)


class BonsaiLayer(nnx.Module):
    def __init__(self, rngs):
        self.attn = BonsaiAttention(rngs)
        self.input_layernorm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        return x + self.attn(self.input_layernorm(x))


@known_as("bonsai.models.qwen3.modeling.Qwen3")
class BonsaiQwen3(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embedder = nnx.Embed(9, 8, rngs=rngs)
        self.layers = nnx.List([BonsaiLayer(rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(8, 9, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embedder(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_bonsai(tmp_path):
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"]
    model = check(BonsaiQwen3, (IDS,), names, tmp_path)
    left = {array.path: array.taken for array in model.coverage()}
    assert left["lm_head/kernel"] == left["embedder/embedding"] == "left out"
