"""Layers of every type flax has for a matrix product, against PyTorch PEFT on nn.Linear."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from randlora_jax import (
    AdapterParam,
    ConfigError,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models.layer_types import LayerType, of_einsum

pytestmark = pytest.mark.torch

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
HEADS, SIZE = 3, 4
NAMES = ["attention.query", "attention.key", "attention.value", "attention.out", "up", "down"]
SETTINGS = {"r": 5, "randlora_alpha": 10, "target_modules": NAMES}


class TorchNet(torch.nn.Module):
    """Self-attention, then a layer up and one down."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.ModuleDict(
            {name: torch.nn.Linear(12, 12) for name in ("query", "key", "value", "out")}
        )
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, x):
        q, k, v = (
            self.attention[name](x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.attention["out"](seen.transpose(1, 2).flatten(-2))
        return self.down(torch.tanh(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self, dtype=None):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(HEADS, 12, decode=False, rngs=rngs, dtype=dtype)
        self.up = nnx.Einsum("bti,ipq->btpq", (12, 4, 5), (4, 5), rngs=rngs, dtype=dtype)
        self.down = nnx.LinearGeneral((4, 5), 12, axis=(-2, -1), rngs=rngs, dtype=dtype)

    def __call__(self, x):
        x = x + self.attention(x)
        return self.down(jnp.tanh(self.up(x)))


class LinenNet(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(HEADS, dtype=self.dtype, name="attention")(x)
        up = nn.Einsum((12, 4, 5), "bti,ipq->btpq", dtype=self.dtype, name="up")(x)
        down = nn.DenseGeneral(12, axis=(-2, -1), dtype=self.dtype, name="down")
        return down(jnp.tanh(up))


VIEWS = {
    "attention/(query|key|value)": "i o o",
    "attention/out": "i i o",
    "up": "i o o",
    "down": "i i o",
}
SHAPES = {
    "attention.out": ((HEADS, SIZE, 12), (12,)),
    "up": ((12, 4, 5), (4, 5)),
    "down": ((4, 5, 12), (12,)),
} | {f"attention.{name}": ((12, HEADS, SIZE), (HEADS, SIZE)) for name in ("query", "key", "value")}


def weights() -> dict[str, dict[str, jax.Array]]:
    """TorchNet's numbers in the shapes of flax's layers, by module."""
    twin = TorchNet()
    return {
        name: {
            "kernel": jnp.asarray(twin.get_submodule(name).weight.detach().numpy().T.reshape(k)),
            "bias": jnp.asarray(twin.get_submodule(name).bias.detach().numpy().reshape(b)),
        }
        for name, (k, b) in SHAPES.items()
    }


def nnx_net(dtype=None):
    net = NnxNet(dtype)
    for name, leaves in weights().items():
        module = net
        for part in name.split("."):
            module = getattr(module, part)
        for leaf, value in leaves.items():
            getattr(module, leaf)[...] = value
    return net


def linen_net(dtype=None):
    leaves = weights()
    inner = {n.removeprefix("attention."): leaves.pop(n) for n in NAMES[:4]}
    return LinenNet(dtype).bind({"params": {**leaves, "attention": inner}})


def nnx_run(model):
    return np.asarray(model(jnp.asarray(X)), np.float32)


def linen_run(model):
    return np.asarray(jax.jit(model.apply)(model.variables, X), np.float32)


def nnx_move(model):
    rng = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(move, nnx.state(model, AdapterParam)))


def linen_move(model):
    rng = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    model.variables = {
        **model.variables,
        "randlora": jax.tree.map(move, model.variables["randlora"]),
    }


KINDS = {
    "nnx": (nnx_net, nnx_run, nnx_move, {}),
    "linen": (linen_net, linen_run, linen_move, {"views": VIEWS}),
}
kinds = pytest.mark.parametrize("kind", sorted(KINDS))


def torch_run(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(X)).numpy()


def assert_same(found, expected):
    base = torch_run(TorchNet())
    assert np.std(expected - base) >= 0.1 * np.std(base)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@kinds
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_ours_opens_in_peft(kind, apply, tmp_path):
    make, run, move, more = KINDS[kind]
    ours = get_peft_model(make(), RandLoraConfig(**SETTINGS), apply=apply, **more)
    np.testing.assert_array_equal(
        run(ours), run(get_peft_model(make(), RandLoraConfig(**SETTINGS), **more))
    )
    np.testing.assert_allclose(run(ours), torch_run(TorchNet()), atol=1e-5)
    move(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(TorchNet(), tmp_path)
    assert_same(run(ours), torch_run(theirs))
    assert set(theirs.targeted_module_names) == set(NAMES)
    for name, found in ours.delta_weights().items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        expected = layer.get_delta_weight("default").detach().numpy()
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    merged = ours.merge_and_unload()
    found = merged(X) if kind == "linen" else nnx_run(merged)
    assert_same(np.asarray(found), torch_run(theirs))


@kinds
def test_pefts_opens_here_with_biases(kind, tmp_path):
    make, run, _, more = KINDS[kind]
    theirs = peft.get_peft_model(TorchNet(), peft.RandLoraConfig(**SETTINGS, bias="all"))
    torch.manual_seed(1)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(make(), tmp_path, **more)
    assert_same(run(ours), torch_run(theirs))


@kinds
def test_in_bfloat16_it_is_as_exact_as_peft(kind, tmp_path, monkeypatch):
    """Over several inputs: the error of one is chance."""
    make, run, move, more = KINDS[kind]
    wide = get_peft_model(make(), RandLoraConfig(**SETTINGS), **more)
    move(wide)
    wide.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(TorchNet().bfloat16(), tmp_path).eval()
    ours = RandLoraModel.from_pretrained(make(jnp.bfloat16), tmp_path, **more)
    mine, others = [], []
    for seed in range(16):
        x = np.random.default_rng(seed).normal(size=X.shape).astype(np.float32)
        monkeypatch.setitem(globals(), "X", x)
        exact = run(wide)
        with torch.no_grad():
            found = theirs(torch.tensor(x).bfloat16()).float().numpy()
        mine.append(run(ours) - exact)
        others.append(found - exact)
    print(f"our error in bfloat16 is {np.std(mine) / np.std(others):.2f} of PEFT's")
    assert np.std(mine) <= 1.5 * np.std(others)


def test_dropout_reaches_layers_of_several_axes():
    config = RandLoraConfig(**SETTINGS, randlora_dropout=0.5)
    model = get_peft_model(nnx_net(), config, rngs=nnx.Rngs(0))
    nnx_move(model)
    model.train()
    first, second = nnx_run(model), nnx_run(model)
    assert np.abs(first - second).max() > 1e-3
    model.eval()
    np.testing.assert_array_equal(nnx_run(model), nnx_run(model))


class MyLayer(nnx.Module):
    """A layer of a user's own."""

    def __init__(self, rngs):
        self.weights = nnx.Param(rngs.normal((12, 20)))

    def __call__(self, x):
        return x @ self.weights[...]


MINE = LayerType(KernelLayout("i o"), leaf="weights")


class MyNet(nnx.Module):
    def __init__(self):
        self.mine = MyLayer(nnx.Rngs(0))

    def __call__(self, x):
        return self.mine(x)


@pytest.mark.parametrize(
    "stated",
    [
        {"layer_types": {MyLayer: MINE}, "apply": "factored"},
        {"layer_types": {"test_layer_types.MyLayer": MINE}},
        {"layer_types": {MyLayer: lambda m: of_einsum("bti,io->bto", leaf="weights")}},
        {"views": {"mine": "i o"}},
    ],
)
def test_a_layer_type_of_the_users_own(stated):
    config = RandLoraConfig(r=5, randlora_alpha=10, target_modules=["mine"])
    model = get_peft_model(MyNet(), config, **stated)
    nnx_move(model)
    changed = MyNet().mine.weights[...] + model.delta_weights()["mine"].T
    np.testing.assert_allclose(nnx_run(model), X @ changed, rtol=1e-4, atol=1e-5)


def test_without_a_word_it_is_refused():
    config = RandLoraConfig(r=5, target_modules=["mine"])
    with pytest.raises(TargetError):
        get_peft_model(MyNet(), config)
    with pytest.raises(ConfigError, match=r"expected one of 3 axes, found 0.*layer_types"):
        get_peft_model(MyNet(), config, views={"mine": "i o o"})


class HeadsFirst(nnx.Module):
    """Its result has the heads before the tokens, which a layout alone does not say."""

    def __init__(self):
        self.w = nnx.Param(nnx.Rngs(0).normal((4, 12, 6)))

    def __call__(self, x):
        return jnp.einsum("btd,hdk->bhtk", x, self.w[...])


@pytest.mark.parametrize("tokens", [1, 5])  # of 1 the sum would broadcast
@pytest.mark.parametrize("jitted", [True, False])
def test_a_layer_of_another_shape_than_its_type_says_is_refused_by_name(tokens, jitted):
    config = RandLoraConfig(r=2, target_modules="all-linear")
    types = {HeadsFirst: LayerType(KernelLayout("o i o"), leaf="w")}
    model = get_peft_model(nnx.Sequential(HeadsFirst()), config, layer_types=types)
    run = nnx.jit(lambda m, x: m(x)) if jitted else lambda m, x: m(x)
    x = jnp.ones((2, tokens, 12))
    words = rf"layer 'layers.0'.*shape \(2, 4, {tokens}, 6\).*\(2, {tokens}, 4, 6\).*of_einsum"
    with pytest.raises(ConfigError, match=words):
        run(model, x)
    model.stack_adapters(2)
    with pytest.raises(ConfigError, match=words):
        model(x, adapter_names=["default", "__base__"])
    types = {HeadsFirst: of_einsum("btd,hdk->bhtk", leaf="w")}
    assert get_peft_model(nnx.Sequential(HeadsFirst()), config, layer_types=types)(x).ndim == 4


def test_a_kernel_that_the_users_layer_type_has_and_the_module_not_is_named():
    config = RandLoraConfig(r=5, target_modules=["mine"])
    words = r"MyLayer keeps its kernel in 'kernel'; the one at 'mine' has 'weights'"
    with pytest.raises(ConfigError, match=words):
        get_peft_model(MyNet(), config, layer_types={MyLayer: of_einsum("bti,io->bto")})


class OwnLinen(nn.Module):
    """A layer with a name of its own for its kernel."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("weights", nn.initializers.lecun_normal(), (12, 12))


class OwnLinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="dense")(OwnLinen(name="mine")(x))


def test_a_kernel_that_a_linen_module_lacks_is_named_once_a_run_tells():
    net, config = OwnLinenNet(), RandLoraConfig(r=5, target_modules=["mine"])
    bound = net.bind(net.init(jax.random.key(0), X))
    words = r"OwnLinen keeps its kernel in 'kernel'; the one at 'mine' has 'weights'"
    equation = "bti,io->bto"
    with pytest.raises(ConfigError, match=words):
        types = {OwnLinen: of_einsum(equation)}
        get_peft_model(bound, config, layer_types=types, sample_inputs=(X,))
    types = {OwnLinen: of_einsum(equation, leaf="weights")}
    model = get_peft_model(bound, config, layer_types=types, sample_inputs=(X,))
    assert model.targeted_module_names == ["mine"]


TWO = ["twofold", "around.base_module"]


class Wrapped(nnx.Module):
    """A layer that already has a LoRA, an embedding and a convolution."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.twofold = nnx.LoRALinear(12, 20, lora_rank=2, rngs=rngs)
        self.around = nnx.LoRA(20, 2, 12, base_module=nnx.Linear(20, 12, rngs=rngs), rngs=rngs)
        self.embed, self.conv = nnx.Embed(7, 12, rngs=rngs), nnx.Conv(12, 12, 3, rngs=rngs)
        for lora in (self.twofold.lora, self.around):
            lora.lora_b[...] = rngs.normal(lora.lora_b.shape)

    def __call__(self, x):
        return self.around(self.twofold(x))


def test_layers_with_a_lora_keep_it():
    config = RandLoraConfig(r=5, target_modules=TWO, randlora_alpha=10)
    model = get_peft_model(Wrapped(), config)
    np.testing.assert_array_equal(nnx_run(model), nnx_run(Wrapped()))
    nnx_move(model)
    expected, deltas = Wrapped(), model.delta_weights()
    for name, layer in zip(TWO, (expected.twofold, expected.around.base_module), strict=True):
        layer.kernel[...] = layer.kernel[...] + deltas[name].T
    np.testing.assert_allclose(nnx_run(model), nnx_run(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["embed", "conv"])
def test_what_is_no_matrix_product_is_refused(name):
    with pytest.raises(TargetError, match="only linear layers can be adapted"):
        get_peft_model(Wrapped(), RandLoraConfig(r=5, target_modules=[name]))


def test_kernels_annotated_with_a_sharding_keep_it():
    with jax.set_mesh(jax.make_mesh((1, 1), ("a", "b"))):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("a", "b"))
        net = nnx.Sequential(nnx.Linear(12, 20, kernel_init=init, rngs=nnx.Rngs(0)))
        model = get_peft_model(net, RandLoraConfig(r=5, target_modules=["layers.0"]))
        nnx_move(model)
        changed = np.asarray(nnx.jit(lambda m: m(jnp.asarray(X)))(model))
        kernel = np.asarray(net.layers[0].kernel[...])
        expected = X @ (kernel + model.delta_weights()["layers.0"].T)
        np.testing.assert_allclose(changed, expected, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
    assert merged.layers[0].kernel.get_metadata()["out_sharding"] == ("a", "b")
