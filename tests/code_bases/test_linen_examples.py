"""vision_transformer, big_vision, lm1b, octo: linen modules that tell their types when run."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from rebuilt import X, bound, check


class VitBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class Vit(nn.Module):
    """With its blocks scanned or not, and a head that attends with a probe of its own."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            scan = nn.scan(
                VitBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = scan(name="encoderblock")(x, None)
        else:
            for i in range(2):
                x, _ = VitBlock(name=f"encoderblock_{i}")(x)
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, 8))
        return nn.MultiHeadDotProductAttention(num_heads=2)(jnp.tile(probe, (2, 1, 1)), x)


HEAD = "MultiHeadDotProductAttention_0"
VIT_LAYERS = [
    *(f"{HEAD}.{part}" for part in ("query", "key", "value", "out")),
    "Dense_0",
    "Dense_1",
]


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.filterwarnings("ignore:.*names")
def test_vision_transformer(scanned, tmp_path):
    block = (lambda i, layer: f"encoderblock_{i}.{layer}") if not scanned else _scanned_name
    names = [block(i, layer) for i in range(2) for layer in VIT_LAYERS]
    names += [f"{HEAD}.{part}" for part in ("query", "key", "value", "out")]
    check(lambda: bound(Vit(scanned), X), (X,), names, tmp_path, sample_inputs=(X,))


def _scanned_name(i, layer):
    """The index of a stack stands before the last part."""
    *outer, last = f"encoderblock.{layer}".split(".")
    return ".".join([*outer, str(i), last])


class Lm1b(nn.Module):
    """Boxes that name fewer axes than their arrays have."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("embed", "kv"))
        y = nn.MultiHeadDotProductAttention(num_heads=2, kernel_init=init)(x, x)
        return nn.Dense(9, kernel_init=init)(y)


def test_lm1b(tmp_path):
    names = [*(f"{HEAD}.{part}" for part in ("query", "key", "value", "out")), "Dense_0"]

    def make():
        return bound(Lm1b(), X)

    model = check(make, (X,), names, tmp_path, sample_inputs=(X,))
    held = model.variables["params"]["Dense_0"]["kernel"]
    assert held.names == ("embed", "kv")


class Octo(nn.Module):
    """Parts in dicts, made in setup, called one by one."""

    def setup(self):
        self.tokenizers = {"primary": nn.Dense(8), "wrist": nn.DenseGeneral((2, 4))}
        self.transformer = Vit(scanned=False)
        self.heads = {"action": nn.Dense(3)}

    def __call__(self, x):
        return self.heads["action"](self.embed(x))

    def embed(self, x):
        eyes = self.tokenizers["primary"](x) + self.tokenizers["wrist"](x).reshape(x.shape)
        return self.transformer(eyes)


def test_octo(tmp_path):
    vit = [f"transformer.encoderblock_{i}.{layer}" for i in range(2) for layer in VIT_LAYERS]
    vit += [f"transformer.{HEAD}.{part}" for part in ("query", "key", "value", "out")]
    names = [*vit, "tokenizers_primary", "tokenizers_wrist", "heads_action"]
    model = check(lambda: bound(Octo(), X), (X,), names, tmp_path, sample_inputs=(X,))
    model.unmerge_adapter()
    part = model.apply(model.variables, X, method="embed")
    assert float(jnp.abs(part - bound(Octo(), X).embed(X)).max()) > 1e-3
