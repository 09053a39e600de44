"""Kernels that scans and vmaps stack along any axis: each layer runs with its own W + delta."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from linen_nets import TOKENS, X, assert_runs_as_merged, close, wrapped

from randlora_jax import ConfigError, KernelLayout, LayerType
from randlora_jax.layer_types import of_einsum
from randlora_jax.models.layer import Layer


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


def stacked(target, axis, length=3):
    along = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
    return nn.scan(target, length=length, **along)


class Layers(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        return stacked(nn.remat(Block), self.axis)(name="layers")(x, None)[0]


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return stacked(Block, 1)(name="inner")(x, None)[0], None


class Nested(nn.Module):
    """Three layers along axis 1 in two along axis 0: (2, 8, 3, 8)."""

    @nn.compact
    def __call__(self, x):
        return stacked(Outer, 0, 2)(name="outer")(x, None)[0]


class Experts(nn.Module):
    """Experts that see one input, stacked along an axis counted from the end."""

    axis: int

    @nn.compact
    def __call__(self, x):
        along = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        experts = nn.vmap(nn.DenseGeneral, in_axes=None, axis_size=3, **along)
        return experts((2, 4), use_bias=False, name="experts")(x)


KINDS = {
    **{f"scan along {a}": (Layers(a), {"layers/dense": v}) for a, v in (
        (0, "s i o"), (1, "i s o"), (-1, "i o s"), (-2, "i s o"),
    )},
    "scan in scan": (Nested(), {"outer/inner/dense": "s i s o"}),
    **{f"vmap along {a}": (Experts(a), {"experts": v}) for a, v in (
        (1, "i s o o"), (-1, "i o o s"), (-3, "i s o o"), (-4, "s i o o"),
    )},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_stack_runs_with_its_own_delta(kind):
    net, views = KINDS[kind]
    assert_runs_as_merged(wrapped(net, X, views=views), X)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_tells_along_which_axes_layers_are_stacked(kind):
    net, views = KINDS[kind]
    told, stated = wrapped(net, X, sample_inputs=(X,)), wrapped(net, X, views=views)
    deltas, expected = told.delta_weights(), stated.delta_weights()
    assert deltas.keys() == expected.keys()
    close(deltas, expected)
    assert_runs_as_merged(told, X)


@pytest.mark.parametrize(
    ("axes", "shape", "spec", "left", "expected"),
    [
        ("sio", (3, 8, 6), P(None, "a", "b"), (8, 6), P("a", "b")),
        ("iso", (8, 3, 6), P("a", None, "b"), (8, 6), P("a", "b")),
        ("ios", (8, 6, 3), P("a", "b"), (8, 6), P("a", "b")),
        ("siso", (2, 8, 3, 6), P(None, "a", None, "b"), (8, 3, 6), P("a", None, "b")),
        ("siso", (2, 8, 3, 6), P(None, "a", None, "b"), (8, 6), P("a", "b")),
        ("iso", (8, 3, 6), P("a", None, "b"), (8, 3, 6), P("a", None, "b")),
    ],
)
def test_a_kernel_in_a_scan_lies_as_the_axes_do_that_are_left(axes, shape, spec, left, expected):
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    held = Layer(("x",), KernelLayout(axes), shape, ("x",), sharding=NamedSharding(mesh, spec))
    assert held.sharding_within(left).spec == expected


class Heads(nn.Module):
    """A layer of a user's own."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.lecun_normal(), (2, 8, 4))
        return jnp.einsum("btd,hdk->bthk", x, w)


class Step(nn.Module):
    """Layers whose types tell an equation."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.tanh(Heads(name="heads")(x).reshape(x.shape))
        x = x + nn.Einsum((8, 8), "btd,dk->btk", name="einsum")(x)
        turned = nn.DenseGeneral(8, axis=0, name="general")(jnp.moveaxis(x, -1, 0))
        return x + turned, None


class Told(nn.Module):
    axis: int
    lift: str = "scan"

    @nn.compact
    def __call__(self, x):
        if self.lift == "scan":
            return stacked(Step, self.axis)(name="layers")(x, None)[0]
        along = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.vmap(Step, in_axes=(None, None), axis_size=3, **along)(name="layers")(x, None)[0]


EQUATION = of_einsum("btd,hdk->bthk", leaf="w")


@pytest.mark.parametrize("lift", ["scan", "vmap"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layers_of_a_stated_equation_are_stacked_along_any_axis(lift, axis):
    told = {"layer_types": {Heads: EQUATION}, "sample_inputs": (TOKENS,)}
    model = wrapped(Told(axis, lift), TOKENS, **told)
    expected = {f"layers.{i}.{name}" for i in range(3) for name in ("heads", "einsum", "general")}
    assert {name.removesuffix(".kernel") for name in model.delta_weights()} == expected
    assert_runs_as_merged(model, TOKENS)


def test_what_a_layout_says_without_an_equation_is_the_same():
    """Heads along an axis of the output are out axes, whichever says so."""
    plain = LayerType(KernelLayout("o i o"), leaf="w")
    told, stated = (
        wrapped(Told(0), TOKENS, layer_types={Heads: known}, sample_inputs=(TOKENS,))
        for known in (EQUATION, plain)
    )
    close(told(TOKENS), stated(TOKENS))


def test_an_equation_with_a_letter_for_the_scan_is_refused_by_name():
    types = {Heads: of_einsum("sbtd,shdk->sbthk", leaf="w")}
    model = wrapped(Told(0), TOKENS, layer_types=types, sample_inputs=(TOKENS,))
    words = (
        r"'layers.heads', a Heads, .*\(2, 8, 4\).*'oio'.*'sbtd,shdk->sbthk'.* 4 axes 'shdk'.*expec"
    )
    with pytest.raises(ConfigError, match=words):
        model(TOKENS)
