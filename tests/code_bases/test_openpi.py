"""openpi: linen modules in an nnx model, scanned, digits in their einsums."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from rebuilt import X, check, known_as


class PiEinsum(nn.Module):
    shape: tuple[int, ...]

    def setup(self):
        self.w = self.param("w", nn.initializers.normal(0.5), self.shape)

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w)


class PiAttention(nn.Module):
    @nn.compact
    def __call__(self, xs):
        found = []
        for i, x in enumerate(xs):
            end = f"_{i}" if i else ""
            q = PiEinsum((2, 8, 4), name=f"q_einsum{end}")("BTD,NDH->BTNH", x)
            k, v = PiEinsum((2, 1, 8, 4), name=f"kv_einsum{end}")("BSD,2KDH->2BSKH", x)
            found.append((q, k, v))
        q, k, v = (jnp.concatenate(parts, 1) for parts in zip(*found, strict=True))
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BNTS", q, k))
        mixed, out, start = jnp.einsum("BNTS,BSKH->BTNH", weights, v), [], 0
        for i, x in enumerate(xs):
            end, part = f"_{i}" if i else "", mixed[:, start : start + x.shape[1]]
            out.append(PiEinsum((2, 4, 8), name=f"attn_vec_einsum{end}")("BTNH,NHD->BTD", part))
            start += x.shape[1]
        return out


class PiFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(0.5), (2, 8, 12))
        linear = self.param("linear", nn.initializers.normal(0.5), (12, 8))
        return jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


class PiBlock(nn.Module):
    @nn.compact
    def __call__(self, xs, _):
        xs = [x + y for x, y in zip(xs, PiAttention(name="attn")(xs), strict=True)]
        names = ["mlp", "mlp_1"]
        return [x + PiFeedForward(name=n)(x) for x, n in zip(xs, names, strict=True)], None


class PiLanguage(nn.Module):
    @nn.compact
    def __call__(self, xs):
        block = nn.scan(
            nn.remat(PiBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return block(name="layers")(xs, None)[0]


@known_as("openpi.models.pi0.Pi0")
class Pi0(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        llm = nnx.bridge.ToNNX(PiLanguage())
        llm.lazy_init([X, X], rngs=rngs)
        self.PaliGemma = nnx.Dict(llm=llm)
        self.state_proj = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return sum(self.PaliGemma.llm([x, jnp.sin(self.state_proj(x))]))


def test_openpi(tmp_path):
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [
        f"mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    decoders = [
        "paligemma_with_expert.paligemma.model.language_model",
        "paligemma_with_expert.gemma_expert.model",
    ]
    names = [f"{d}.layers.{i}.{part}" for d in decoders for i in range(2) for part in parts]
    check(Pi0, (X,), [*names, "state_proj"], tmp_path)
