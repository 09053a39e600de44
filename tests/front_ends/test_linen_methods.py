"""Whatever a linen module does with its kernels, by any method, is done with W + delta."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen_nets import CONFIG, TOKENS, X, assert_runs_as_merged, close, slopes, wrapped

from randlora_jax import ConfigError, KernelLayout, LayerType, RandLoraConfig, get_peft_model

INIT = nn.initializers.lecun_normal()


class TwoMethods(nn.Module):
    """Two kernels, in setup style, and no call; results that are no arrays."""

    def setup(self):
        self.kernel, self.other = (
            self.param("kernel", INIT, (8, 6)),
            self.param("other", INIT, (6, 8)),
        )

    def up(self, x):
        return x @ self.kernel

    def down(self, hidden, *, scale=1.0, mode="a"):
        assert mode in ("a", "b")
        return {"y": hidden @ self.other * scale, "count": 3, "mode": mode}


class Methods(nn.Module):
    def setup(self):
        self.two, self.dense = TwoMethods(), nn.Dense(8)

    def __call__(self, x):
        out = self.two.down(self.two.up(self.dense(x)), mode="b")
        assert (out["count"], out["mode"]) == (3, "b")
        return out["y"]


class Rematted(nn.Module):
    """A method under a transformation, with a static argument, and a layer inside."""

    @functools.partial(nn.remat, static_argnums=(2,))
    @nn.compact
    def __call__(self, x, inner):
        kernel = self.param("kernel", INIT, (8, 8))
        return (nn.Dense(8, name="inner")(x) if inner else x) @ kernel


class Scanned(nn.Module):
    @functools.partial(nn.scan, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(x @ self.param("kernel", INIT, (8, 8))), None


class Einsum(nn.Module):
    """The input comes second."""

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), (8, 2, 4)))


class Within(nn.Module):
    """A module called with some arguments."""

    m: nn.Module
    args: tuple = ()
    before: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.m(*self.before, x, *self.args)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")
        return attention(inputs_q=x, inputs_k=x[:, :3], inputs_v=x[:, :3])


class Adopted(nn.Module):
    """Shares its scope with a layer, and has kernels of its own there."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        a, b = self.param("a", INIT, (8, 2)), self.param("b", INIT, (2, 6))
        return self.base(x) + x @ a @ b


ADOPTED, HEAD = Adopted(nn.Dense(6)), nn.Einsum((8, 2, 4))
HEADS = {"attn/(query|key|value)": "i o o", "attn/out": "i i o"}
KINDS = {
    "two methods": (Methods(), X, {"two/(kernel|other)": "i o"}, 3),
    "a method under remat": (Within(Rematted(), (True,)), X, {"m": "i o"}, 2),
    "a method under scan": (Within(Scanned(), (None,)), X, {"m": "i s o"}, 3),
    "input second": (Within(Einsum(), (), ("btd,dnh->btnh",)), TOKENS, {"m": "i o o"}, 1),
    "an equation in the call": (Within(HEAD, ("btd,dnh->btnh",)), TOKENS, {"m": "i o o"}, 1),
    "inputs by keyword": (Attention(), TOKENS, HEADS, 4),
    "cells": (Within(nn.RNN(nn.LSTMCell(6))), TOKENS, {}, 8),
    "cells that read kernels": (Within(nn.RNN(nn.OptimizedLSTMCell(6))), TOKENS, {}, 8),
    "a shared scope": (Within(ADOPTED), X, {}, 1),
    "all of a shared scope": (Within(ADOPTED), X, {"m/(kernel|a|b)": "i o"}, 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_runs_as_w_plus_delta(kind):
    net, x, views, layers = KINDS[kind]
    model = wrapped(net, x, views=views)
    assert len(model.targeted_module_names) == layers
    assert_runs_as_merged(model, x)


class Stateful(nn.Module):
    """A layer with a state, statistics, dropout and a count, called twice."""

    @nn.compact
    def __call__(self, x, train=True):
        kernel = self.param("kernel", INIT, (8, 8))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        count = self.variable("stats", "count", lambda: jnp.zeros(()))
        if self.is_mutable_collection("stats"):
            count.value += 1
        return x @ kernel


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = Stateful(name="layer")
        return nn.Dense(3, name="head")(layer(layer(x)))


STATED = {"layer_types": {Stateful: LayerType(KernelLayout("i o"))}}


@pytest.mark.parametrize("rules", [{"views": {"layer": "i o"}}, STATED])
def test_collections_and_rngs_are_the_plain_models(rules):
    model = wrapped(Twice(), X, **rules)
    run = {"rngs": {"dropout": jax.random.key(9)}, "mutable": ["batch_stats", "stats"]}
    found, changed = model.apply(model.variables, X, **run)
    before = model.variables["stats"]["layer"]["count"]
    assert all(np.any(g) for g in jax.tree.leaves(slopes(model, X, **run)))
    module, variables = model.merge_and_unload().unbind()
    close((found, changed), module.apply(variables, X, **run))
    assert changed["stats"]["layer"]["count"] == before + 2


def test_a_layer_that_keeps_a_state_cannot_have_adapter_dropout():
    config = RandLoraConfig(r=4, target_modules=["layer"], randlora_dropout=0.5)
    model = wrapped(Twice(), X, config=config, **STATED)
    run = {"rngs": {"dropout": jax.random.key(9)}, "mutable": ["batch_stats", "stats"]}
    with pytest.raises(ConfigError, match=r"'layer' cannot run.*it changes its collections"):
        model.apply(model.variables, X, **run)


class Reused(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, name="dense")
        return dense(jnp.tanh(dense(x)))


def test_what_flax_sows_is_no_state_of_a_layer():
    config = dataclasses.replace(CONFIG, randlora_dropout=0.5)
    model = wrapped(Reused(), X, config=config)
    drawn = {"rngs": {"dropout": jax.random.key(9)}}
    plain = model.apply(model.variables, X, **drawn)
    assert np.abs(plain - model.apply(model.variables, X)).max() > 1e-2
    found, changed = model.apply(model.variables, X, capture_intermediates=True, **drawn)
    np.testing.assert_array_equal(found, plain)
    first, second = changed["intermediates"]["dense"]["__call__"]
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(second, found)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", INIT, (8, 8))
        return nn.Dropout(0.5, deterministic=False)(x @ kernel)


def test_what_a_layer_draws_is_what_it_would_draw_unadapted():
    config = RandLoraConfig(r=4, target_modules=["m"])
    types = {Dropping: LayerType(KernelLayout("i o"))}
    model = wrapped(Within(Dropping()), X, config=config, layer_types=types)
    rngs = {"dropout": jax.random.key(9)}
    expected = model.module.apply({"params": model.variables["params"]}, X, rngs=rngs)
    np.testing.assert_array_equal(model.apply(model.variables, X, rngs=rngs), expected)
    found = jax.jit(functools.partial(model.apply, rngs=rngs))(model.variables, X)
    close(found, expected)


def test_decoding_with_a_cache():
    decoding = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    net = Within(decoding)
    variables = net.init(jax.random.key(0), TOKENS)
    model = get_peft_model(
        net.bind(variables),
        CONFIG,
        rngs=jax.random.key(1),
        views={"m/(query|key|value)": "i o o", "m/out": "i i o"},
    )
    cache, found = variables["cache"], []
    for t in range(3):
        whole = {**model.variables, "cache": cache}
        out, changed = model.apply(whole, TOKENS[:, t : t + 1], mutable=["cache"])
        cache = changed["cache"]
        found.append(out)
    module, merged = model.merge_and_unload().unbind()
    cache = variables["cache"]
    for t in range(3):
        whole = {**merged, "cache": cache}
        out, changed = module.apply(whole, TOKENS[:, t : t + 1], mutable=["cache"])
        cache = changed["cache"]
        close(found[t], out)


def test_nothing_of_adapters_is_in_what_a_call_changes():
    model = wrapped(Within(nn.Dense(3)), X)
    _, changed = model.apply(model.variables, X, mutable=True)
    assert jax.tree.structure(changed) == jax.tree.structure({"params": model.variables["params"]})
    _, changed = model.apply(model.variables, X, capture_intermediates=True)
    assert set(changed) == {"intermediates"}


@pytest.mark.parametrize("kept", ["one by one", "in stacks"])
def test_what_is_trained_whole_is_the_base_models_in_what_a_call_changes(kept):
    config = dataclasses.replace(CONFIG, target_modules=["a"], modules_to_save=["b"])
    model = wrapped(Parts(), X, init="both", config=config)
    base = model.variables["params"]
    trained, frozen = model.split()
    moved = jax.tree.map(lambda x: x + 0.5, trained)
    model.variables = {**frozen, "randlora": moved}
    if kept == "in stacks":
        model.stack_adapters(2)
    found, changed = model.apply(model.variables, X, mutable=True, method="both")
    assert np.abs(found - model.module.apply({"params": base}, X, method="both")).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, changed, {"params": base})
    model.variables = {**model.variables, **changed}
    close(model.apply(model.variables, X, method="both"), found)


class Parts(nn.Module):
    def setup(self):
        self.a, self.b = nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        return self.a(x)

    def part(self, x):
        return self.b(x)

    def both(self, x):
        return self.a(self.b(x))


def test_a_layer_that_no_call_reaches_is_named():
    model = wrapped(Parts(), X, init="both")
    with pytest.raises(ConfigError, match=r"'b' did not run.*optional="):
        model.apply(model.variables, X)
    with pytest.raises(ConfigError, match="'b' did not run"):
        jax.jit(model.apply)(model.variables, X)
    model.apply(model.variables, X, method="part")
    model.apply(model.variables, X)
    optional = wrapped(Parts(), X, init="both", optional=["b"])
    optional.apply(optional.variables, X)
    with optional.disable_adapter():
        optional.apply(optional.variables, X)


class Jitted(nn.Module):
    """What ``nn.jit`` compiles stays for every later call of whatever model."""

    def setup(self):
        self.inner = Within(nn.Dense(8))

    @nn.jit
    def part(self, x):
        return self.inner(x)

    def __call__(self, x):
        return self.part(x)


def test_a_jitted_method_runs_with_the_adapters_of_its_own_call():
    net = Jitted()
    variables = net.init(jax.random.key(0), X)
    settings = {"target_modules": "all-linear", "init_weights": False, "r": 4}
    models, rngs = [], jax.random.key(1)
    for more in ({"randlora_alpha": 8}, {"randlora_alpha": 80}, {"projection_prng_key": 7}):
        config = RandLoraConfig(**settings, **more)
        models.append(get_peft_model(net.bind(variables), config, rngs=rngs))
    (name,) = models[0].delta_weights()
    expected = []
    for model in models:
        params = jax.tree.map(lambda x: x, variables["params"])
        held = params
        for part in name.split("."):
            held = held[part]
        held["kernel"] += model.delta_weights()[name].T
        expected.append(net.apply({"params": params}, X))
    for _ in range(2):
        for model, y in zip(models, expected, strict=True):
            close(model.apply(model.variables, X), y)
            close(jax.jit(model.apply)(model.variables, X), y)
            assert all(np.any(g) for g in jax.tree.leaves(slopes(model, X, jit=True)))
    models[0].add_adapter("second", RandLoraConfig(**settings, randlora_alpha=30), rngs=rngs)
    for name in ("second", "default", "second"):
        models[0].set_adapter(name)
        y = models[0].apply(models[0].variables, X)
        assert (name == "default") == np.allclose(y, expected[0], rtol=1e-4, atol=1e-4)


def test_a_linen_module_that_has_a_module_is_no_hugging_face_model():
    class Holder(nn.Module):
        module: nn.Module

        def __call__(self, x):
            return self.module(x)

    assert type(wrapped(Holder(nn.Dense(3)), X)).__name__ == "LinenRandLora"
