"""Base models quantised by qwix: integers, nf4, floats of few bits, whole or in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from quantised_nets import CONFIG, FRONT_ENDS, QUANTISE, Net, X, samples, wrapped

from randlora_jax import ConfigError, RandLoraModel, get_peft_model

KINDS = [(kind, tile) for kind in ("int8", "int4", "nf4") for tile in (None, 16)]
KINDS += [("float8_e4m3fn", None), ("mxfp4", 32)]


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
    assert model.get_nb_trainable_parameters() == twin.get_nb_trainable_parameters()
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


@FRONT_ENDS
@pytest.mark.parametrize("rows", [3, 400])
def test_an_input_of_16_bits_meets_the_adapter_in_the_dtype_of_the_scales(front_end, rows):
    """As it meets the quantised kernel, by flax's own rules."""
    model, _ = wrapped(front_end, "int8")
    x = jnp.resize(X, (rows, 64)).astype(jnp.bfloat16)
    with model.disable_adapter():
        base = model(x)
    assert base.dtype == jnp.float32
    np.testing.assert_allclose(model(x), model(x.astype(jnp.float32)), rtol=1e-4, atol=1e-4)


@FRONT_ENDS
def test_an_input_of_integers(front_end):
    model, _ = wrapped(front_end, "int8")
    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, (3, 64)), jnp.uint8)
    np.testing.assert_allclose(model(x), model(x.astype(jnp.float32)), rtol=1e-4, atol=1e-4)
