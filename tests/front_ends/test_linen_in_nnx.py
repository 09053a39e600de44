"""Linen modules inside nnx ones (``nnx.bridge.ToNNX``): adapted, trained, saved and merged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, RandLoraModel, get_peft_model

X = jax.random.normal(jax.random.key(0), (5, 8))
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, use_bias=False, name="dense")(x)), None


class Tower(nn.Module):
    """Layers, attention, statistics, a scan along axis 1, and an nnx layer inside."""

    def setup(self):
        self.dense, self.norm = nn.Dense(12), nn.BatchNorm(use_running_average=False)
        self.attention = nn.MultiHeadDotProductAttention(num_heads=2)
        self.inner = nnx.bridge.ToLinen(nnx.Linear, args=(12, 8))
        scanned = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        self.stack = scanned()

    def __call__(self, x):
        return self.stack(self.inner(nn.relu(self.norm(self.seen(x)))), None)[0]

    def seen(self, x):
        y = self.dense(x)[None]
        return (y + self.attention(y, y))[0]


class Net(nnx.Module):
    def __init__(self):
        self.tower = nnx.bridge.ToNNX(Tower(), rngs=nnx.Rngs(0)).lazy_init(X)
        self.head = nnx.Linear(8, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.tower(x, mutable=["batch_stats"]))


VIEWS = {
    "tower/stack/dense": "i s o",
    "tower/attention/(query|key|value)": "i o o",
    "tower/attention/out": "i i o",
}


def wrapped(**more):
    return get_peft_model(Net(), CONFIG, rngs=nnx.Rngs(1), views=VIEWS, **more)


def changed(model):
    """The plain model with delta in its kernels."""
    plain, deltas = Net(), model.delta_weights()
    kernels = dict(nnx.to_flat_state(nnx.state(plain, nnx.Param)))
    for layer in model._registry.layers.values():
        delta = layer.join(deltas).swapaxes(-1, -2)
        kernel = kernels[layer.kernel_path]
        kernel[...] += layer.layout.to_kernel(jnp.asarray(delta), kernel.shape)
    return plain


def close(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_they_are_adapted_as_any_other(tmp_path):
    model = wrapped()
    assert (
        len(model.targeted_module_names) == 10 and not model.coverage().numbers()["left out"] - 36
    )
    plain = changed(model)
    expected = plain(X)
    close(model(X), expected)
    close(model.tower.norm["mean"][...], plain.tower.norm["mean"][...])  # what a call changes
    close(nnx.jit(lambda m, x: m(x))(model, X), expected)
    close(model.tower.seen(X), plain.tower.seen(X))
    wrt = nnx.DiffState(0, AdapterParam)
    grads = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=wrt))(model, X)
    assert len(jax.tree.leaves(grads)) == 16 and all(g.any() for g in jax.tree.leaves(grads))
    model.save_pretrained(tmp_path)
    again = RandLoraModel.from_pretrained(Net(), tmp_path, views=VIEWS)
    np.testing.assert_array_equal(again(X), model(X))
    close(model.merge_and_unload()(X), expected)


def test_before_training_it_is_the_base_model_to_the_bit():
    config = RandLoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(Net(), config, views=VIEWS)
    np.testing.assert_array_equal(model(X), Net()(X))
    with wrapped().disable_adapter():
        np.testing.assert_array_equal(model(X), Net()(X))


def test_what_is_left_out_is_said():
    with pytest.warns(UserWarning, match=r"tower/attention/key/kernel.*views=\{r'tower/attention"):
        model = get_peft_model(Net(), CONFIG, rngs=nnx.Rngs(1))
    assert "tower.dense" in model.targeted_module_names


def test_several_adapters_and_what_is_trained_whole(tmp_path):
    more = RandLoraConfig(
        r=3, target_modules=["dense"], modules_to_save=["head"], init_weights=False
    )
    model = wrapped()
    model.add_adapter("more", more, rngs=nnx.Rngs(5))
    first = model(X)
    model.set_adapter("more")
    assert np.abs(model(X) - first).max() > 1e-2
    model.merge_adapter()
    merged = model(X)
    model.unmerge_adapter()
    close(model(X), merged)
    with pytest.raises(ConfigError, match=r"'tower\.dense' was called outside"):
        model.model.tower(X, mutable=["batch_stats"])
