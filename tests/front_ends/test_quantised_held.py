"""Quantised arrays that are no attribute of a module: in containers, Variables, bridged modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import (
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    TargetError,
    get_peft_model,
)

qwix = pytest.importorskip("qwix")

CONFIG = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
PROVIDER = qwix.PtqProvider(
    [qwix.QuantizationRule(module_path=".*", weight_qtype="nf4", tile_size=16)]
)


def bare(n_out=32):
    """As a user quantises an array."""
    numbers = jax.random.normal(jax.random.key(0), (64, n_out)) / 8
    return qwix.quantize(numbers, "int8", channelwise_axes=[1])


def of_provider():
    """As qwix puts one in a Param's place, with Params in it."""
    return qwix.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), PROVIDER, X).kernel


def without_variables(held):
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda x: x[...] if is_variable(x) else x, held, is_leaf=is_variable)


PLACES = {
    "a Param": ("weights", lambda: nnx.Param(bare())),
    "a Param with how": ("weights", lambda: nnx.Param(without_variables(of_provider()))),
    "an attribute": ("weights", bare),
    "nnx.List": ("weights/0", lambda: nnx.List([of_provider()])),
    "nnx.List of Params": ("weights/0", lambda: nnx.List([nnx.Param(bare())])),
    "nnx.Dict": ("weights/a", lambda: nnx.Dict(a=of_provider())),
    "a list": ("weights/0", lambda: nnx.data([of_provider()])),
    "a tuple in a dict": ("weights/a/0", lambda: nnx.data({"a": (of_provider(),)})),
}


class Mine(nnx.Module):
    """Multiplies by the first quantised or floating kernel that it holds, wherever that is."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        held = self.weights
        while not hasattr(held, "shape"):
            held = next(iter(held.values() if hasattr(held, "values") else held))
        kernel = without_variables(held)
        kernel = getattr(kernel, "array", kernel)
        return qwix.dot_general(x, kernel, (((1,), (0,)), ((), ())))


class Net(nnx.Module):
    def __init__(self, weights):
        self.mine, self.head = Mine(weights), nnx.Linear(32, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(self.mine(x))


def moved(model):
    """`model` with lambda and gamma drawn anew."""
    draw = np.random.default_rng(1)
    state = nnx.state(model, nnx.LoRAParam)
    drawn = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype), state)
    nnx.update(model, drawn)
    return model


def assert_near(found, expected, share=2e-6):
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


def loss(model, x):
    return jnp.sin(model(x)).sum()


@pytest.mark.parametrize("place", PLACES)
def test_a_layer_of_ones_own_runs_as_it_is_and_merges_into_floats(place):
    leaf, weights = PLACES[place]
    types = {Mine: LayerType(KernelLayout("i o"), leaf=leaf)}
    base = Net(weights())
    plain = base(X)
    model = get_peft_model(base, CONFIG, layer_types=types)
    assert (model(X) == plain).all()
    moved(model)
    out, gradient = model(X), nnx.jit(nnx.grad(loss, argnums=1))(model, X)
    assert "not W + delta_W: its kernel holds" in model.explain(64)
    with pytest.raises(ConfigError, match=r"no adapter can be merged into 'mine'.*dequantize"):
        model.merge_adapter()
    copy = nnx.merge(*nnx.split(model))  # of the same Variables
    assert_near(copy.merge_and_unload(dequantize=True)(X), out)
    assert (model(X) == out).all()
    merged = model.merge_and_unload(dequantize=True)
    floats = nnx.state(merged, nnx.Param)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(floats))
    assert_near(merged(X), out)
    assert_near(nnx.grad(loss, argnums=1)(merged, X), gradient, 1e-5)


def test_bytes_are_those_of_the_integers_and_scales():
    types = {Mine: LayerType(KernelLayout("i o"), leaf="weights")}
    model = get_peft_model(Net(bare()), CONFIG, layer_types=types)
    assert model.memory().base == 64 * 32 + 4 * 32 + 4 * (32 * 8 + 8)


def test_what_no_adapter_takes_becomes_float_too():
    model = get_peft_model(Net(nnx.List([of_provider()])), CONFIG)
    merged = moved(model).merge_and_unload(dequantize=True)
    assert merged.mine.weights[0].shape == (64, 32)
    assert merged.mine.weights[0].dtype == jnp.float32


def test_one_array_in_two_places_takes_no_adapter():
    shared = of_provider()
    base = nnx.Sequential(Mine(nnx.List([shared])), lambda x: x @ jnp.ones((32, 64)), Mine(shared))
    types = {Mine: lambda m: LayerType(KernelLayout("i o"), leaf="weights")}
    with pytest.raises(TargetError, match=r"layers.2.*its array is layers\.0\.weights\.0"):
        get_peft_model(base, CONFIG, layer_types=types)


class Two(nnx.Module):
    def __init__(self):
        self.kernels = nnx.List([of_provider(), of_provider()])

    def __call__(self, x):
        return sum(
            qwix.dot_general(x, without_variables(k).array, (((1,), (0,)), ((), ())))
            for k in self.kernels
        )


def test_several_in_one_module_are_refused_when_it_is_wrapped():
    views = {"layers/0/kernels/(0|1)/array/qvalue": "i o"}
    with pytest.raises(TargetError, match=r"uint4 numbers.*layer_types"):
        get_peft_model(nnx.Sequential(Two()), CONFIG, views=views)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="up")(x))
        return nn.Dense(32, use_bias=False, name="down")(x)


class Around(nnx.Module):
    """An nnx model with a quantised linen one in it."""

    def __init__(self):
        inner = qwix.quantize_model(LinenNet(), PROVIDER)
        self.inner = nnx.bridge.lazy_init(nnx.bridge.ToNNX(inner, rngs=nnx.Rngs(0)), X)
        self.head = nnx.Linear(32, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.inner(x))


def test_a_quantised_linen_model_in_an_nnx_one():
    base = Around()
    plain = base(X)
    model = get_peft_model(base, CONFIG)
    assert set(model.targeted_module_names) == {"inner.up", "inner.down", "head"}
    assert (model(X) == plain).all()
    weights = 64 * 128 + 128 * 32
    assert model.memory().base == weights / 2 + 4 * weights / 16 + 4 * (128 + 32 * 8 + 8)
    moved(model)
    out, gradient = model(X), nnx.jit(nnx.grad(loss, argnums=1))(model, X)
    said = model.explain(64)
    assert said.count("not W + delta_W: its kernel holds uint4") == 2
    with pytest.raises(ConfigError, match=r"'inner\.(up|down)'.*uint4.*dequantize=True"):
        model.merge_adapter()
    merged = model.merge_and_unload(dequantize=True)
    assert_near(merged(X), out)
    assert_near(nnx.grad(loss, argnums=1)(merged, X), gradient, 1e-5)


class Inside(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.up(x)) @ jnp.ones((64, 64))


class LinenAround(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nnx.bridge.ToLinen(Inside, name="inner")(x))


def test_a_quantised_linen_model_leaves_the_nnx_ones_in_it_as_they_are():
    module = qwix.quantize_model(LinenAround(), PROVIDER)
    base = module.bind(module.init(jax.random.key(0), X))
    plain = base(X)
    model = get_peft_model(base, CONFIG, sample_inputs=(X,))
    assert (model(X) == plain).all()
    trained, frozen = model.split()
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    model.variables = {**frozen, "randlora": trained}
    out = model(X)
    assert model.explain(64).count("uint4") == 1, "the head alone"
    assert_near(model.merge_and_unload(dequantize=True)(X), out, 1e-5)


def test_quantised_arrays_in_boxes_stay_in_them():
    named = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
    module = qwix.quantize_model(nn.Sequential([nn.Dense(32, kernel_init=named)]), PROVIDER)
    base = module.bind(module.init(jax.random.key(0), X))
    model = get_peft_model(base, CONFIG, sample_inputs=(X,))
    plain = model(X)
    merged = model.merge_and_unload(dequantize=True)
    assert merged.variables["params"]["layers_0"]["kernel"].names == ("rows", "columns")
    assert_near(merged(X), plain)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(64)(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        how = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Block, **how)()(x, None)[0]


def test_quantised_kernels_of_a_scan_along_another_axis():
    module = qwix.quantize_model(Scanned(), PROVIDER)
    base = module.bind(module.init(jax.random.key(0), X))
    model = get_peft_model(base, CONFIG, sample_inputs=(X,))
    (layer,) = model._registry.layers.values()
    assert layer.layout.axes == "iso" and layer.stack == (3,)
    trained, frozen = model.split()
    model.variables = {**frozen, "randlora": jax.tree.map(lambda x: x + 0.1, trained)}
    out = model(X)
    assert_near(model.merge_and_unload(dequantize=True)(X), out)


def test_a_params_tree_says_why_not_and_what_to_do():
    module = qwix.quantize_model(LinenNet(), PROVIDER)
    params = module.init(jax.random.key(0), X)["params"]
    for rule in ("up|down", "(up|down)/kernel/array/qvalue"):
        with pytest.raises(TargetError, match=r"uint4 numbers.*qwix\.dequantize.*wrap the flax"):
            get_peft_model(params, CONFIG, views={rule: "i o"})
    mixed = {**params, "down": {"kernel": jnp.ones((128, 32))}}
    model = get_peft_model(mixed, CONFIG, views={"down": "i o"})
    floats = model.merge_and_unload(dequantize=True)
    assert floats["up"]["kernel"].dtype == jnp.float32 and floats["up"]["kernel"].shape == (64, 128)


class OfRngs(Mine):
    def __init__(self, rngs):
        super().__init__(nnx.Param(bare()))


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.mine, self.last = OfRngs(rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.mine(x))


class OneInside(nn.Module):
    kind: type = OfRngs

    @nn.compact
    def __call__(self, x):
        return nnx.bridge.ToLinen(self.kind, name="inner")(x)


def test_quantised_nnx_modules_in_linen_ones():
    """Those that are the whole of a ToLinen run beside; a part of one is refused when wrapped."""
    types = {OfRngs: LayerType(KernelLayout("i o"), leaf="weights")}
    rules = {"layer_types": types, "sample_inputs": (X,)}
    base = OneInside().bind(OneInside().init(jax.random.key(0), X))
    model = get_peft_model(base, CONFIG, **rules)
    np.testing.assert_array_equal(model(X), base(X))
    trained, frozen = model.split()
    model.variables = {**frozen, "randlora": jax.tree.map(lambda x: x + 0.1, trained)}
    (delta,) = model.delta_weights().values()
    np.testing.assert_allclose(model(X), base(X) + X @ delta.T, rtol=1e-4, atol=1e-3)
    pair = OneInside(Pair)
    base = pair.bind(pair.init(jax.random.key(0), X))
    with pytest.raises(TargetError, match=r"inner\.mine.*int8 numbers.*a part of an nnx module"):
        get_peft_model(base, CONFIG, **rules)
