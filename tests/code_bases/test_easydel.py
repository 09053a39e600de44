"""EasyDeL: linear layers of its own, quantised ones that pack, experts sorted by tokens."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rebuilt import X, check, check_beside, drawn, known_as

from randlora_jax import ConfigError, RandLoraModel


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


BITS, GROUP = 4, 4


def prepacked(kernel):
    """Codes of 4 bits for groups of a row, eight to a word with the lowest first; as ejkernel's."""
    groups = kernel.reshape(*kernel.shape[:-1], -1, GROUP)
    least = groups.min(-1)
    scales = (groups.max(-1) - least) / (2**BITS - 1)
    codes = jnp.round((groups - least[..., None]) / scales[..., None]).astype(jnp.uint32)
    words = codes.reshape(len(kernel), -1, 32 // BITS) << jnp.arange(0, 32, BITS, dtype=jnp.uint32)
    return words.sum(-1, dtype=jnp.uint32), scales, least


def dequantised(words, scales, least):
    codes = words[..., None] >> jnp.arange(0, 32, BITS, dtype=jnp.uint32) & (2**BITS - 1)
    groups = codes.reshape(*scales.shape, GROUP).astype(scales.dtype)
    return (groups * scales[..., None] + least[..., None]).reshape(len(words), -1)


@known_as("easydel.layers.linears._linear_quantized.ParallelLinearQuantized")
class ParallelLinearQuantized(nnx.Module):
    def __init__(self, n_in, n_out, rngs, affine=True):
        self.in_features, self.out_features, self.rngs, self.dtype = n_in, n_out, rngs, None
        words, scales, least = prepacked(rngs.normal((n_in, n_out)))
        self.quant_kernel, self.quant_scales = nnx.Param(words), nnx.Param(scales)
        # modes that need no zero points keep a Param of None
        self.quant_biases = nnx.Param(least if affine else None)

    def __call__(self, inputs, w=None):
        least = self.quant_biases.get_raw_value()
        scales = self.quant_scales[...]
        least = jnp.zeros_like(scales) if least is None else least
        return inputs @ dequantised(self.quant_kernel[...], scales, least)


class ColumnParallelLinearQuantized(ParallelLinearQuantized):
    _direction = "column"


class QuantisedMLP(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = ColumnParallelLinearQuantized(8, 16, rngs)
        self.down_proj = ParallelLinearQuantized(16, 8, rngs, affine=False)

    def __call__(self, x):
        return self.down_proj(jnp.tanh(self.gate_proj(x)))


class QuantisedLayer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = QuantisedMLP(rngs)


class QuantisedModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([QuantisedLayer(rngs) for _ in range(2)])


class LlamaForCausalLM(EasyDeLBaseModule):
    def __init__(self):
        self.config = SimpleNamespace(model_type="llama")
        self.model = QuantisedModel(nnx.Rngs(0))

    def __call__(self, x):
        for layer in self.model.layers:
            x = x + 0.1 * layer.mlp(x)
        return x


def as_float(layer):
    """The same layer in floats."""
    kept = (layer.quant_kernel, layer.quant_scales, layer.quant_biases)
    words, scales, least = (held.get_raw_value() for held in kept)
    least = jnp.zeros_like(scales) if least is None else least
    linear = nnx.Linear(layer.in_features, layer.out_features, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = dequantised(words, scales, least)
    return linear


def test_quantised_linear_layers(tmp_path):
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "down")]
    model, out = check_beside(LlamaForCausalLM, (X,), names, tmp_path)
    said = model.explain(10)
    assert said.count("is packed into uint32 numbers") == 2
    assert "model.layers.0.mlp.gate_proj and 1 more (8 -> 16): " in said
    assert "model.layers.0.mlp.down_proj and 1 more (16 -> 8): " in said
    with pytest.raises(ConfigError, match=r"mlp\.(gate|down)_proj'.*packed.*unquantised"):
        model.merge_adapter()
    numbers = 4 * 8 * 16
    assert model.memory().base == numbers / 2 + 4 * numbers / GROUP + 4 * numbers / GROUP / 2
    floats = LlamaForCausalLM()
    for layer in floats.model.layers:
        for name in ("gate_proj", "down_proj"):
            setattr(layer.mlp, name, as_float(getattr(layer.mlp, name)))
    twin = RandLoraModel.from_pretrained(floats, tmp_path)
    np.testing.assert_allclose(twin(X), out, rtol=1e-5, atol=1e-5)
