"""Layers that hold their kernel packed: several numbers in each of an array of another shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import (
    ConfigError,
    Contraction,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)

CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules=["mine"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
CODES = np.random.default_rng(1).integers(0, 16, (16, 24))


def packed(codes):
    """(in, out) codes of 4 bits as (out, in / 8) numbers of 32: turned around, eight in each."""
    words = codes.T.reshape(codes.shape[1], -1, 8).astype(np.uint32)
    return jnp.asarray((words << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32))


def unpacked(words, scale):
    codes = words[..., None] >> jnp.arange(0, 32, 4, dtype=jnp.uint32) & 15
    return (codes.reshape(len(words), -1).T.astype(jnp.float32) - 8) * scale


class Packed(nnx.Module):
    """One of a user's own, which computes x @ kernel + bias."""

    def __init__(self):
        self.n_in, self.n_out = CODES.shape
        self.words, self.scale = nnx.Param(packed(CODES)), nnx.Param(jnp.float32(0.1))
        self.bias = nnx.Param(jnp.ones(self.n_out))

    def __call__(self, x):
        return x @ unpacked(self.words[...], self.scale[...]) + self.bias


class Net(nnx.Module):
    def __init__(self, layer):
        self.mine = layer

    def __call__(self, x):
        return jnp.tanh(self.mine(x))


def told(module):
    return LayerType(KernelLayout("i o"), leaf="words", shape=(module.n_in, module.n_out))


TYPES = {Packed: told}


def floats():
    layer = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    layer.kernel[...] = unpacked(packed(CODES), 0.1)
    layer.bias[...] = jnp.ones(24)
    return Net(layer)


def moved(model):
    draw = np.random.default_rng(2)
    state = nnx.state(model, nnx.LoRAParam)
    drawn = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), x.dtype), state)
    nnx.update(model, drawn)
    return model


def loss(model, x):
    return (model(x) ** 2).sum()


@pytest.mark.parametrize("jit", [False, True])
def test_it_runs_as_the_float_model_with_the_same_weights(jit, tmp_path):
    base = Net(Packed())
    plain = base(X)
    model = get_peft_model(base, CONFIG, layer_types=TYPES)
    np.testing.assert_array_equal(model(X), plain)
    moved(model).save_pretrained(tmp_path)
    twin = RandLoraModel.from_pretrained(floats(), tmp_path, is_trainable=True)
    assert np.abs(twin(X) - plain).max() > 0.1
    np.testing.assert_allclose(model(X), twin(X), atol=1e-5)
    slope = nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.LoRAParam), 1))
    found, expected = ((nnx.jit(slope) if jit else slope)(m, X) for m in (model, twin))
    leaves = [[np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (found, expected)]
    for mine, theirs in zip(*leaves, strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_delta_is_beside_and_merging_says_why_not():
    model = get_peft_model(Net(Packed()), CONFIG, layer_types=TYPES)
    said = model.explain(64)
    assert said.startswith("mine (16 -> 24):") and "all W + delta_W" not in said
    assert "not W + delta_W: its kernel (16, 24) is packed into uint32 numbers of shape" in said
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"'mine': its kernel \(16, 24\) is packed.*beside"):
            merge()
    with pytest.raises(ConfigError, match="no array of the base model is quantised"):
        model.merge_and_unload(dequantize=True)
    kernel = (16 * 24) // 2
    assert model.memory().base == kernel + 4 + 4 * 24
    trained, every = model.get_nb_trainable_parameters()
    assert every - trained == 16 * 24 + 1 + 24


def test_an_equation_of_another_product():
    class Heads(Packed):
        def __call__(self, x):
            kernel = unpacked(self.words[...], self.scale[...]).reshape(16, 4, 6)
            return jnp.einsum("btd,dnh->bnth", x, kernel)

    call = Contraction("btd,dnh->bnth")
    types = {Heads: LayerType(KernelLayout("i o o"), call, leaf="words", shape=(16, 4, 6))}
    plain = Heads()(X)
    model = moved(get_peft_model(nnx.Dict(mine=Heads()), CONFIG, layer_types=types))
    (delta,) = model.delta_weights().values()
    expected = jnp.einsum("btd,dnh->bnth", X, delta.T.reshape(16, 4, 6))
    np.testing.assert_allclose(model.mine(X), plain + expected, atol=1e-4)


class LinenPacked(nn.Module):
    n_in: int
    n_out: int

    @nn.compact
    def __call__(self, x):
        words = self.param("words", lambda key: packed(CODES))
        return x @ unpacked(words, 0.1) + 1


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(LinenPacked(*CODES.shape, name="mine")(x))


def test_linen(tmp_path):
    base = LinenNet().bind(LinenNet().init(jax.random.key(0), X))
    rules = {"layer_types": {LinenPacked: told}, "sample_inputs": (X,)}
    model = get_peft_model(base, CONFIG, **rules)
    np.testing.assert_array_equal(model(X), base(X))
    trained, frozen = model.split()
    model.variables = {**frozen, "randlora": jax.tree.map(lambda x: x + 0.3, trained)}
    model.save_pretrained(tmp_path)
    twin = RandLoraModel.from_pretrained(floats(), tmp_path)
    np.testing.assert_allclose(model(X), twin(X), atol=1e-5)
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        get_peft_model(base, CONFIG, layer_types={LinenPacked: told})


def test_what_cannot_be_is_said():
    for shape in ((16,), [16, 24], (16, 0), "16 24"):
        with pytest.raises(ConfigError, match="shape: expected the 2 extents"):
            LayerType(KernelLayout("i o"), shape=shape)
    unknown = LayerType(KernelLayout("i o"), None, leaf="words", shape=(16, 24))
    with pytest.raises(TargetError, match=r"what the layer computes is unknown.*Contraction"):
        get_peft_model(Net(Packed()), CONFIG, layer_types={Packed: unknown})


class Tower(nnx.Module):
    """Two of them, stacked."""

    def __init__(self, layer):
        self.mine = nnx.vmap(layer, axis_size=2)()

    def __call__(self, x):
        how = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
        return nnx.scan(lambda x, layer: x + layer(x), **how)(x, self.mine)


class PackedSquare(nnx.Module):
    def __init__(self):
        self.words = nnx.Param(packed(CODES[:, :16]))

    def __call__(self, x):
        return x @ unpacked(self.words[...], 0.01)


class FloatSquare(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(unpacked(packed(CODES[:, :16]), 0.01))

    def __call__(self, x):
        return x @ self.kernel[...]


def test_packed_kernels_that_scans_slice(tmp_path):
    stack = LayerType(KernelLayout("s i o"), leaf="words", shape=(2, 16, 16))
    model = get_peft_model(Tower(PackedSquare), CONFIG, layer_types={PackedSquare: stack})
    moved(model).save_pretrained(tmp_path)
    types = {FloatSquare: LayerType(KernelLayout("i o"))}
    twin = RandLoraModel.from_pretrained(Tower(FloatSquare), tmp_path, layer_types=types)
    assert len(model.targeted_module_names) == 2
    np.testing.assert_allclose(model(X), twin(X), rtol=1e-5, atol=1e-4)


class LinenTower(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + LinenSquare(16, 16, name="mine")(x), None

        how = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(Step, **how, length=2)(name="steps")(x, None)[0]


class LinenSquare(nn.Module):
    n_in: int
    n_out: int

    @nn.compact
    def __call__(self, x):
        return x @ unpacked(self.param("words", lambda key: packed(CODES[:, :16])), 0.01)


def test_packed_kernels_that_scans_of_linen_slice():
    rules = {"layer_types": {LinenSquare: told}, "sample_inputs": (X,)}
    config = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear")
    base = LinenTower().bind(LinenTower().init(jax.random.key(0), X))
    model = get_peft_model(base, config, **rules)
    trained, frozen = model.split()
    assert [x.shape[0] for x in jax.tree.leaves(trained)] == [2, 2]
    model.variables = {**frozen, "randlora": jax.tree.map(lambda x: x + 0.3, trained)}
    first, second = model.delta_weights().values()
    kernel, expected = unpacked(packed(CODES[:, :16]), 0.01), X
    for delta in (first, second):
        expected = expected + expected @ (kernel + delta.T)
    np.testing.assert_allclose(model(X), expected, rtol=1e-4, atol=1e-3)
    other = LinenTower(1).bind(LinenTower(1).init(jax.random.key(0), X))
    with pytest.raises(ConfigError, match=r"packed kernel.*stack it along axis 0"):
        get_peft_model(other, config, **rules)


def test_another_array_than_was_found():
    model = get_peft_model(Net(Packed()), CONFIG, layer_types=TYPES)
    nnx.update(model, {"model": {"mine": {"base_layer": {"words": packed(CODES[:, :16])}}}})
    with pytest.raises(ConfigError, match=r"'mine'.*expected an array of shape \(24, 2\)"):
        model(X)
