"""Base models quantised by qwix: int8, int4, nf4, whole or in tiles; nnx and linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

qwix = pytest.importorskip("qwix")

CONFIG = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
KINDS = [(kind, tile) for kind in ("int8", "int4", "nf4") for tile in (None, 16)]
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 32, use_bias=False, rngs=rngs)
        self.heads = nnx.Einsum("BTD,DNH->BTNH", (32, 4, 16), rngs=rngs)

    def __call__(self, x):
        return self.heads(self.down(nnx.relu(self.up(x)))[None])[0]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128, name="up")(x))
        x = nn.Dense(32, use_bias=False, name="down")(x)
        return nn.DenseGeneral((4, 16), name="heads")(x)


def provider(kind, tile):
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=kind, tile_size=tile)
    return qwix.PtqProvider([rule])


def quantised_nnx(kind, tile):
    return qwix.quantize_model(Net(), provider(kind, tile), X)


def quantised_linen(kind, tile):
    module = qwix.quantize_model(LinenNet(), provider(kind, tile))
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
    numbers = LinenNet().init(jax.random.key(0), X)["params"]
    return module.bind({"params": qwix.quantize_params(numbers, shapes)})


QUANTISE = {"nnx": quantised_nnx, "linen": quantised_linen}


def samples(front_end):
    return {"sample_inputs": (X,)} if front_end == "linen" else {}


def wrapped(front_end, kind, tile, scale=0.1):
    """A quantised model, its outputs, and it with an adapter that moves them."""
    base = QUANTISE[front_end](kind, tile)
    plain = base(X)
    model = get_peft_model(base, CONFIG, **samples(front_end))
    assert (model(X) == plain).all()
    draw = np.random.default_rng(1)

    def drawn(leaf):
        return jnp.asarray(draw.normal(0, scale, leaf.shape), leaf.dtype)

    if front_end == "nnx":
        nnx.update(model, jax.tree.map(drawn, nnx.state(model, nnx.LoRAParam)))
    else:
        trained, frozen = model.split()
        model.variables = {**frozen, "randlora": jax.tree.map(drawn, trained)}
    return model, plain


def gradients(model, weights):
    """Of lambda, gamma and the input, by the names of their leaves."""
    if isinstance(model, nnx.Module):
        moving = (nnx.DiffState(0, nnx.LoRAParam), 1)
        loss = lambda model, x: (model(x) * weights).sum()  # noqa: E731
        trained, x = nnx.grad(loss, argnums=moving)(model, X)
        leaves = {path: leaf.get_raw_value() for path, leaf in nnx.to_flat_state(trained)}
    else:
        trained, frozen = model.split()
        loss = lambda t, x: (model.apply({**frozen, "randlora": t}, x) * weights).sum()  # noqa: E731
        trained, x = jax.grad(loss, argnums=(0, 1))(trained, X)
        leaves = flatten_dict(trained)
    named = {".".join(map(str, path)): leaf for path, leaf in leaves.items()}
    return {**{name.replace("/array/qvalue", ""): leaf for name, leaf in named.items()}, "x": x}


def assert_near(found, expected, share):
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= share * np.abs(expected).max()


FRONT_ENDS = pytest.mark.parametrize("front_end", ["nnx", "linen"])
QUANTISED = pytest.mark.parametrize(("kind", "tile"), KINDS)


@FRONT_ENDS
@QUANTISED
def test_it_runs_and_merges_as_the_dequantised_model_does(front_end, kind, tile, tmp_path):
    """Outputs and gradients, by an adapter file in a float32 twin; then merged."""
    model, plain = wrapped(front_end, kind, tile)
    out = model(X)
    assert (out - plain).std() > 0.1 * plain.std()
    weights = jnp.asarray(np.random.default_rng(2).normal(size=out.shape), jnp.float32)
    found = gradients(model, weights)
    model.save_pretrained(tmp_path)

    untouched, _ = wrapped(front_end, kind, tile, scale=0)
    base = untouched.merge_and_unload(dequantize=True)
    assert not [
        x for x in jax.tree.leaves(arrays(base)) if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert_near(base(X), plain, 2e-6)
    twin = RandLoraModel.from_pretrained(base, tmp_path, is_trainable=True, **samples(front_end))
    assert_near(twin(X), out, 2e-6)
    expected = gradients(twin, weights)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, 1e-5)

    assert_near(model.merge_and_unload(dequantize=True)(X), out, 2e-6)


def arrays(base):
    return nnx.state(base, nnx.Param) if isinstance(base, nnx.Module) else base.variables


@FRONT_ENDS
def test_the_layer_itself_runs_as_it_is_and_delta_beside(front_end):
    model, _ = wrapped(front_end, "nf4", 16)
    said = model.explain(64)
    assert said.count("not W + delta_W") == 3 and "uint4" in said
    assert "all W + delta_W" not in said


@FRONT_ENDS
def test_bytes_are_the_quantised_models_and_the_adapters(front_end):
    model, _ = wrapped(front_end, "nf4", 16)
    found = model.memory()
    base = QUANTISE[front_end]("nf4", 16)
    assert found.base <= 1.05 * sum(x.nbytes for x in jax.tree.leaves(arrays(base)))


@FRONT_ENDS
def test_merging_says_what_is_in_the_way(front_end):
    model, _ = wrapped(front_end, "int8", None)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"int8 numbers.*dequantize=True"):
            merge()
    broken, _ = wrapped(front_end, "int8", None, scale=np.inf)
    with pytest.raises(ConfigError, match="not finite"):
        broken.merge_and_unload(dequantize=True, safe_merge=True)
    assert not jnp.isfinite(broken(X)).all(), "it is as it was"


def test_nothing_to_dequantise():
    model = get_peft_model(Net(), CONFIG)
    with pytest.raises(ConfigError, match="no array of the base model is quantised"):
        model.merge_and_unload(dequantize=True)
    with pytest.raises(ConfigError, match="dequantize: expected True or False"):
        model.merge_and_unload(dequantize="yes")


class Unreadable:
    """A quantised array of a package that says no more than what it holds."""

    def __init__(self, qvalue, scale):
        self.array = self
        self.qvalue, self.scale = nnx.Param(qvalue), nnx.Param(scale)


def test_a_quantised_array_that_its_package_does_not_read():
    base = Net()
    numbers = base.up.kernel[...]
    model = get_peft_model(base, CONFIG)
    model.model.up.base_layer.kernel = Unreadable(numbers, numbers)
    with pytest.raises(ConfigError, match=r"up.kernel.*no dequantize\(\)"):
        model.merge_and_unload(dequantize=True)
