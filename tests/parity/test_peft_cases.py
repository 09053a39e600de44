"""What PEFT asks of RandLoRA in its ``tests/test_randlora.py``, asked of ours.

The cases are upstream's (5d602fdb), in our words and for our API; what PEFT shares, draws and
shapes is asked of the installed PEFT. `test_peft_rows` has those of ``test_custom_models.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from peft_mlp import MAKE, NnxMLP, TorchMLP, X, config, outputs, run, wrapped
from randlora_jax.interop.peft_dir import read_adapter
from safetensors import safe_open

from randlora_jax import AdapterParam, ConfigError, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

PLAIN = {"projection_source": "torch:bf16-24bit", "save_projection": False}


@pytest.fixture(params=sorted(MAKE))
def mlp(request):
    """Makes the same small model again and again."""
    return MAKE[request.param]


def shared_pairs(model):
    """The leaves that are bases, wherever the model keeps them."""
    if hasattr(model, "variables"):
        return jax.tree.leaves(model.variables["randlora_bases"])
    return jax.tree.leaves(nnx.state(model)["randlora_bases"])


def test_adapters_of_one_key_share_one_pair(mlp):
    """Between layers and between adapters: A and B are in the model once."""
    model = wrapped(mlp())
    assert sorted(x.shape for x in shared_pairs(model)) == [(20, 1, 32), (32, 20)]
    a, b = shared_pairs(model)
    assert a is not b
    alone = get_peft_model(mlp(), config(), rngs=jax.random.key(1))
    for one, two in zip(shared_pairs(alone), shared_pairs(model), strict=True):
        np.testing.assert_array_equal(one, two)
    outputs(model, "default", "other")


def test_adapters_of_another_key_are_refused(mlp):
    model = get_peft_model(mlp(), config(), rngs=jax.random.key(1))
    before = run(model)
    message = r"projection_prng_key=123 differs from adapter 'default', which has 0"
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("other", config(projection_prng_key=123), rngs=jax.random.key(2))
    assert list(model.peft_config) == ["default"]
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize("first", [True, False])
def test_all_adapters_save_their_bases_or_none_does(mlp, first):
    torchs = {"projection_source": "torch:bf16-24bit"}
    model = get_peft_model(mlp(), config(save_projection=first, **torchs), rngs=jax.random.key(1))
    with pytest.raises(ConfigError, match=f"save_projection={not first} differs .* {first}"):
        model.add_adapter(
            "other", config(save_projection=not first, **torchs), rngs=jax.random.key(2)
        )


def test_saving_several_adapters_without_bases(mlp, tmp_path):
    model = wrapped(mlp(), "first", "second", **PLAIN)
    before = outputs(model, "first", "second")
    model.save_pretrained(tmp_path)
    for name in ("first", "second"):
        assert (tmp_path / name / "adapter_config.json").exists()
        with safe_open(tmp_path / name / "adapter_model.safetensors", "numpy") as file:
            keys = list(file.keys())
        assert len(keys) == 4
        assert not [key for key in keys if "randlora_A" in key or "randlora_B" in key]
    assert not (tmp_path / "adapter_config.json").exists()

    again = RandLoraModel.from_pretrained(mlp(), tmp_path / "first", "first")
    again.load_adapter(tmp_path / "second", "second")
    for expected, found in zip(before, outputs(again, "first", "second"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_saving_several_adapters_with_bases(mlp, tmp_path):
    model = wrapped(mlp())
    before = outputs(model, "default", "other")
    model.save_pretrained(tmp_path)
    again = RandLoraModel.from_pretrained(mlp(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert len(shared_pairs(again)) == 2
    for expected, found in zip(before, outputs(again, "default", "other"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_lambda_and_gamma_are_nobody_elses():
    """Each layer of each adapter has its own: changing one moves no other."""
    model = wrapped(NnxMLP())
    model.set_adapter(["default", "other"])
    before = nnx.to_flat_state(nnx.state(model, AdapterParam))
    assert len(before) == 8
    for path, _ in before:
        flat = dict(nnx.to_flat_state(nnx.state(model, AdapterParam)))
        frozen = {p: np.asarray(x[...]) for p, x in flat.items()}
        flat[path] = flat[path].replace(flat[path][...] + 1)
        nnx.update(model, nnx.from_flat_state(flat))
        for p, x in nnx.to_flat_state(nnx.state(model, AdapterParam)):
            np.testing.assert_array_equal(x[...], frozen[p] + (p == path))


def test_layers_of_different_shapes(mlp, tmp_path):
    """A gets the largest in, B the largest out, though they are different layers'."""
    model = get_peft_model(mlp(), config(target_modules=["lin0", "lin3"]), rngs=jax.random.key(1))
    assert np.isfinite(run(model)).all()
    model.save_pretrained(tmp_path)
    a, b = read_adapter(tmp_path).bases
    assert (a.shape, b.shape) == ((32, 1, 20), (20, 1, 32))
    theirs = peft.get_peft_model(TorchMLP(), peft.RandLoraConfig(target_modules=["lin0", "lin3"]))
    assert theirs.randlora_A["default"].shape == a.shape
    assert theirs.randlora_B["default"].shape == b.shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes(mlp, dtype):
    """The output has the base model's dtype, whatever the adapter is held in."""
    model = get_peft_model(mlp(dtype), config(), rngs=jax.random.key(1))
    x = jnp.asarray(X, dtype)
    with model.disable_adapter():
        base = model.apply(model.variables, x) if hasattr(model, "variables") else model(x)
    found = model.apply(model.variables, x) if hasattr(model, "variables") else model(x)
    assert found.dtype == base.dtype and found.shape == base.shape
    assert np.abs(np.asarray(found, np.float32) - np.asarray(base, np.float32)).max() > 1e-3
