"""Modules of every sort in a linen model whose rows have adapters of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from linen_rows import adapted, alone, assert_rows

from randlora_jax import ConfigError

X = jax.random.normal(jax.random.key(1), (4, 6, 8))
NAMES = ["b", "__base__", "a", "b"]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class Bridge(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="dense")(nnx.bridge.ToLinen(Inner, name="bridge")(x))


class Scaled(nn.Module):
    """With an array of its own, beside a layer inside."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (8,))
        return scale * nn.Dense(8, name="dense")(x)


class Around(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="last")(Scaled(name="scaled")(x))


class Tanh(nn.Module):
    """No sum over axes of its input."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (8, 5))
        return jnp.tanh(x) @ kernel + self.param("bias", nn.initializers.normal(), (5,))


class Stated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(Tanh(name="tanh")(x))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="dense")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        along = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        experts = nn.vmap(nn.Dense, in_axes=None, out_axes=-1, axis_size=3, **along)
        return experts(8, use_bias=False, name="experts")(x)


class Flattened(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x.reshape(-1, 8)).reshape(*x.shape[:-1], 3)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.LayerNorm(name="norm")(x), None


class ScannedNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        along = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Norm, length=3, **along)(name="norms")(x, None)
        return nn.Dense(3, name="dense")(x)


CASES = {
    "attention": (Attention(), (["query", "out"], None), ["value"], {"sample_inputs": (X,)}),
    "a bridge trained whole": (Bridge(), (["dense"], "bridge"), ["dense"], {}),
    "a leaf around a layer": (Around(), (["last"], "scaled"), ["scaled.dense", "last"], {}),
    "a norm with state": (Normed(), (["dense"], "norm"), ["dense"], {}),
    "experts": (Experts(), (["experts"], None), ["experts"], {"views": {"experts": "s i o"}}),
}  # fmt: skip

REFUSED = {
    "a part of an nnx module": (Bridge(), (["linear"], None), "part of an nnx module", {}),
    "tokens of all rows": (Flattened(), (["dense"], None), "with 24 rows", {}),
    "leaves that a scan takes apart": (ScannedNorms(), (["dense"], "norm"), "takes it apart", {}),
    "no sum": (Stated(), (["tanh"], "dense"), "nothing is known", {"views": {"tanh": "i o"}}),
}


def wrapped(net, first, second, **rules):
    targets, whole = first
    saved = [whole] if whole else None
    one = {"r": 3, "randlora_alpha": 3, "target_modules": targets, "modules_to_save": saved}
    two = {"r": 2, "randlora_alpha": 2, "target_modules": second, "bias": "all", "sparse": True}
    return adapted(net, {"a": one, "b": two}, inputs=X, **rules)


SLOW = ("attention", "a bridge trained whole")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in SLOW else case for case in CASES]
)
def test_it_runs_by_row(case):
    net, first, second, rules = CASES[case]
    model, bound = wrapped(net, first, second, **rules)
    each = alone(model, bound, X)
    model.stack_adapters(3)
    assert_rows(model(X, adapter_names=NAMES), NAMES, each)


class Derived(nn.Dense):
    """With the very call of a layer that is known."""


class Counted(nn.Module):
    """Which writes into a collection, as caches do, beside layers that do not."""

    layer: type

    @nn.compact
    def __call__(self, x):
        calls = self.variable("cache", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("cache"):
            calls.value += 1
        return self.layer(8, name="dense")(x)


@pytest.mark.parametrize("kind", ["of flax", "derived", "of GPT-2"])
def test_known_layers_run_by_row_where_others_change_collections(kind):
    layer = {"of flax": nn.Dense, "derived": Derived}.get(kind)
    if layer is None:  # known by its name
        layer = pytest.importorskip("transformers.models.gpt2.modeling_flax_gpt2").FlaxConv1D
    config = {"r": 3, "randlora_alpha": 3, "target_modules": ["dense"]}
    configs = {"a": config, "b": config}
    model, bound = adapted(Counted(layer), configs, inputs=X, sample_inputs=(X,))
    each = alone(model, bound, X)
    found, changed = model(X, adapter_names=NAMES, mutable=["cache"])
    assert_rows(found, NAMES, each)
    assert changed["cache"]["calls"] == bound.variables["cache"]["calls"] + 1


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_and_runs_under_vmap(case):
    net, first, message, rules = REFUSED[case]
    model, bound = wrapped(net, first, first[0], **rules)
    with pytest.raises(ConfigError, match=message + r".*jax\.vmap"):
        model(X, adapter_names=NAMES)
    each = alone(model, bound, X)
    model.stack_adapters(3)
    variables = model.variables

    def one(x, slot):
        return model.apply(variables, x[None], adapter_names=slot)[0]

    found = jax.vmap(one)(X, model.rows(NAMES))
    expected = jnp.stack([each[name][i] for i, name in enumerate(NAMES)])
    assert jnp.abs(found - expected).max() <= 2e-6 * jnp.abs(expected).max()
