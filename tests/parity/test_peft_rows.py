"""What PEFT asks of RandLora in its ``tests/test_custom_models.py``, asked of ours.

The rows and cases are upstream's (5d602fdb), in our words and for our API; where PEFT's tests are
content that numbers are close, the installed PEFT is asked for its numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from peft_mlp import NnxMLP, X, config, outputs, run, torch_mlp, trained, wrapped
from randlora_jax.interop.peft_dir import read_adapter

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

ROWS = {
    "one, by expression": {"target_modules": "lin0"},
    "one, by name": {"target_modules": ["lin0"]},
    "the other": {"target_modules": ["lin3"]},
    "both": {"target_modules": ["lin0", "lin3"]},
    "sparse": {"target_modules": ["lin0", "lin3"], "sparse": True},
    "very sparse": {"target_modules": ["lin0", "lin3"], "very_sparse": True},
    "beside a whole module": {"target_modules": ["lin0"], "modules_to_save": ["lin3"]},
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param] | {"randlora_alpha": 1}


def torchs(row):
    """The settings, with the bases that the installed PyTorch draws."""
    is_sparse = "sparse" in row or "very_sparse" in row
    return RandLoraConfig(**row, projection_source="torch" if is_sparse else "torch:bf16-24bit")


def moved(model):
    """The same model after its adapter has gone a long way."""
    before, rng = run(model), np.random.default_rng(1)
    state = nnx.state(model, AdapterParam)
    move = lambda x: x + jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(move, state))
    assert np.abs(run(model) - before).max() > 1e-2
    return model


def test_a_fresh_adapter_is_pefts(row, tmp_path):
    """Every tensor of it, bases included, and it changes nothing."""
    get_peft_model(NnxMLP(), torchs(row)).save_pretrained(tmp_path / "ours")
    theirs = peft.get_peft_model(torch_mlp(NnxMLP()), peft.RandLoraConfig(**row))
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "theirs")
    assert one.layers.keys() == two.layers.keys() and one.saved.keys() == two.saved.keys()
    for name in one.layers:
        for x, y in zip(one.layers[name], two.layers[name], strict=True):
            np.testing.assert_array_equal(x, y)
    for name in one.saved:
        np.testing.assert_array_equal(one.saved[name], two.saved[name])
    for x, y in zip(one.bases, two.bases, strict=True):
        np.testing.assert_array_equal(x.astype(np.float32), y)
    assert one.config.scaling == two.config.scaling
    np.testing.assert_array_equal(run(get_peft_model(NnxMLP(), torchs(row))), run(NnxMLP()))


def test_only_the_adapter_trains(row):
    """Three steps move lambda, gamma and whole modules, all of them, and nothing else."""
    model = get_peft_model(NnxMLP(), RandLoraConfig(**row))
    before = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}

    def loss(model):
        return model(jnp.asarray(X))[:, 0].sum()

    for _ in range(3):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        state = nnx.state(model, AdapterParam)
        nnx.update(model, jax.tree.map(lambda x, g: x - g, state, grads))
    changed = {
        path
        for path, x in nnx.to_flat_state(nnx.state(model))
        if not np.array_equal(x[...], before[path])
    }
    assert changed == trained(model).keys()
    layers = 2 if "lin3" in row["target_modules"] and "lin0" in row["target_modules"] else 1
    assert len(changed) == 2 * layers + 2 * ("modules_to_save" in row)
    assert np.abs(run(model) - run(NnxMLP())).max() > 1e-4


def test_a_trained_adapter_comes_back(row, tmp_path):
    model = moved(get_peft_model(NnxMLP(), torchs(row)))
    model.save_pretrained(tmp_path)
    again = RandLoraModel.from_pretrained(NnxMLP(), tmp_path, is_trainable=True)
    assert trained(again).keys() == trained(model).keys()
    for path, x in trained(model).items():
        np.testing.assert_array_equal(trained(again)[path][...], x[...])
    np.testing.assert_array_equal(run(again), run(model))
    frozen = RandLoraModel.from_pretrained(NnxMLP(), tmp_path)
    assert not trained(frozen) and frozen.peft_config["default"].inference_mode
    np.testing.assert_array_equal(run(frozen), run(model))

    theirs = peft.PeftModel.from_pretrained(torch_mlp(NnxMLP()), tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(X)).numpy(), run(model), atol=1e-5, rtol=0)


def test_the_name_of_an_adapter_makes_no_difference(row, tmp_path):
    """Not even one that is a part of other names in the file."""
    expected = run(moved(get_peft_model(NnxMLP(), RandLoraConfig(**row))))
    for name in ("adapter1", "randlora", "lin0", "l"):
        model = moved(get_peft_model(NnxMLP(), RandLoraConfig(**row), name))
        np.testing.assert_array_equal(run(model), expected)
        model.save_pretrained(tmp_path)
        again = RandLoraModel.from_pretrained(NnxMLP(), tmp_path / name, name + "x")
        assert list(again.peft_config) == [name + "x"]
        np.testing.assert_array_equal(run(again), expected)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(row, safe_merge):
    model = moved(get_peft_model(NnxMLP(), RandLoraConfig(**row)))
    expected = run(model)
    model.merge_adapter(safe_merge=safe_merge)
    np.testing.assert_allclose(run(model), expected, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="merged already"):  # once more changes nothing
        model.merge_adapter(safe_merge=safe_merge)
    np.testing.assert_allclose(run(model), expected, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    np.testing.assert_array_equal(run(model), expected)
    np.testing.assert_allclose(run(model.merge_and_unload(safe_merge)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_merging_in_half_precision(row, dtype):
    model = get_peft_model(NnxMLP(dtype), RandLoraConfig(**row))
    merged = moved(model).merge_and_unload()
    assert merged.lin0.kernel[...].dtype == dtype
    assert np.isfinite(run(merged)).all()


def test_disabling(row):
    base = run(NnxMLP())
    model = moved(get_peft_model(NnxMLP(), RandLoraConfig(**row)))
    adapted = run(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
            adapted = run(model)
        with model.disable_adapter():
            np.testing.assert_array_equal(run(model), base)
        np.testing.assert_array_equal(run(model), adapted)


def test_what_is_active(row):
    model = get_peft_model(NnxMLP(), RandLoraConfig(**row))
    model.add_adapter("other", RandLoraConfig(**row))
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    with pytest.raises(ConfigError, match="already here"):
        model.add_adapter("other", RandLoraConfig(**row))
    assert model.active_adapters == ["other"]
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert model.active_adapters == ["other"]


def test_deleting(row):
    model = moved(get_peft_model(NnxMLP(), RandLoraConfig(**row)))
    expected = run(model)
    model.add_adapter("idle", RandLoraConfig(**row))
    model.delete_adapter("idle")
    assert list(model.peft_config) == ["default"]
    np.testing.assert_array_equal(run(model), expected)
    with pytest.raises(ConfigError, match="no adapter named 'idle'"):
        model.delete_adapter("idle")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    model.delete_adapter("default")  # the last one
    assert model.active_adapters == [] and not trained(model)
    np.testing.assert_array_equal(run(model), run(NnxMLP()))


def test_loading_several_adapters(row, tmp_path):
    moved(get_peft_model(NnxMLP(), RandLoraConfig(**row))).save_pretrained(tmp_path)
    model = RandLoraModel.from_pretrained(NnxMLP(), tmp_path)
    model.load_adapter(tmp_path, "other")
    model.load_adapter(tmp_path, "third")
    assert list(model.peft_config) == ["default", "other", "third"]
    expected = run(model)
    for name in ("other", "third"):
        model.set_adapter(name)
        np.testing.assert_array_equal(run(model), expected)


# Two active adapters ("RandLora Same").


def test_several_active_adapters():
    """Together they add up; merged one after the other or at once, and back to the very bits."""
    model = wrapped(NnxMLP(), target_modules=["lin0"], randlora_alpha=1)
    outputs(model, "default", "other")
    model.set_adapter(["default", "other"])
    both = run(model)
    base = NnxMLP()
    for name in ("default", "other"):
        change = model.delta_weights(name)["lin0"].T
        base.lin0.kernel[...] = base.lin0.kernel[...] + change
    np.testing.assert_allclose(both, run(base), atol=1e-5, rtol=0)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    one_by_one = run(model)
    model.unmerge_adapter()
    np.testing.assert_array_equal(run(model), both)
    model.merge_adapter(["default", "other"])
    np.testing.assert_allclose(run(model), one_by_one, atol=1e-5, rtol=0)
    np.testing.assert_allclose(run(model), both, atol=1e-5, rtol=0)
    with model.disable_adapter():
        np.testing.assert_array_equal(run(model), run(NnxMLP()))


# What is trained while adapters come and go.


def trained_names(model):
    """(layer, part, adapter) of everything that an optimizer sees."""
    return {path[1:] for path in trained(model)}


def names(adapter, *layers):
    parts = ("randlora_lambda", "randlora_gamma")
    return {(layer, part, adapter, "kernel") for layer in layers for part in parts}


@pytest.mark.parametrize("second", [["lin2"], ["lin1", "lin2"]])
def test_only_active_adapters_are_trained(second):
    """And never the bases."""
    first = ["lin1"] if second == ["lin2"] else second
    model = get_peft_model(NnxMLP(), RandLoraConfig(target_modules=first))
    model.add_adapter("adapter1", RandLoraConfig(target_modules=second))
    assert trained_names(model) == names("default", *first)
    model.set_adapter("default")
    assert trained_names(model) == names("default", *first)
    model.set_adapter("adapter1")
    assert trained_names(model) == names("adapter1", *second)
    with model.disable_adapter():
        assert trained_names(model) == set()
    assert trained_names(model) == names("adapter1", *second)


# Second adapters that PEFT cannot hold beside the first, or holds wrongly.


@pytest.mark.parametrize(
    "second",
    [
        {"target_modules": ["lin3"]},
        {"target_modules": ["lin0", "lin1", "lin3"]},
        {"r": 8},
        {"r": 40},
        {"sparse": True},
    ],
    ids=str,
)
def test_a_second_adapter_of_other_targets_rank_or_kind(second, tmp_path):
    """Each computes what it computes alone, here and in PEFT."""
    one, two = {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]} | second
    model = get_peft_model(NnxMLP(), config(**one), rngs=jax.random.key(1))
    model.add_adapter("other", config(**two), rngs=jax.random.key(2))
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        alone = RandLoraModel.from_pretrained(NnxMLP(), folder)
        np.testing.assert_array_equal(run(model), run(alone))
        theirs = peft.PeftModel.from_pretrained(torch_mlp(NnxMLP()), folder)
        with torch.no_grad():
            expected = theirs(torch.tensor(X)).numpy()
        np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
