"""EasyDeL: linear layers of its own, experts sorted by tokens."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from rebuilt import X, check, drawn, known_as


@known_as("easydel.layers.linears._linear.ParallelLinear")
class ParallelLinear(nnx.Module):
    def __init__(self, n_in, n_out, rngs):
        self.kernel, self.scale = drawn(rngs, n_in, n_out), 0.5

    def __call__(self, x):
        return self.scale * (x @ self.kernel[...])


@known_as("easydel.layers.linears._linear_moe.ParallelMoELinear")
class ParallelMoELinear(nnx.Module):
    def __init__(self, n_in, n_out, rngs, out_first=False):
        self.out_first = out_first
        self.kernel = drawn(rngs, 3, n_out, n_in) if out_first else drawn(rngs, 3, n_in, n_out)

    def __call__(self, x, group_sizes):
        kernel = self.kernel[...].mT if self.out_first else self.kernel[...]
        return jax.lax.ragged_dot(x, kernel, group_sizes)


@known_as("easydel.infra.base_module.EasyDeLBaseModule")
class EasyDeLBaseModule(nnx.Module):
    pass


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = ParallelMoELinear(8, 12, rngs)
        self.down_proj = ParallelMoELinear(12, 8, rngs, out_first=True)


class EasyDeLMixture(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.experts = ParallelLinear(8, 3, rngs), Experts(rngs)

    def __call__(self, x):
        rows = x.reshape(-1, 8)
        chosen = jnp.arange(len(rows)) % 3
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=3)
        hidden = nnx.silu(self.experts.gate_proj(rows[order], sizes))
        out = self.experts.down_proj(hidden, sizes)[jnp.argsort(order)]
        return (out * jax.nn.sigmoid(self.gate(rows)).sum(-1, keepdims=True)).reshape(x.shape)


class EasyDeLLayer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = EasyDeLMixture(rngs)


class EasyDeLModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([EasyDeLLayer(rngs) for _ in range(2)])


class Qwen3MoeForCausalLM(EasyDeLBaseModule):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.config = SimpleNamespace(model_type="qwen3_moe")
        self.model = EasyDeLModel(rngs)

    def __call__(self, x):
        for layer in self.model.layers:
            x = x + layer.mlp(x)
        return x


def test_easydel(tmp_path):
    names = [f"model.layers.{i}.mlp.gate" for i in range(2)] + [
        f"model.layers.{i}.mlp.experts.{e}.{part}_proj"
        for i in range(2)
        for e in range(3)
        for part in ("gate", "down")
    ]
    check(Qwen3MoeForCausalLM, (X,), names, tmp_path)
