"""Methods that users intercept (``nn.intercept_methods``): once each, around layer and adapter."""

import flax.linen as nn
import jax
import linen_rows
import numpy as np
import pytest
from linen_nets import X, close, wrapped

from randlora_jax import KernelLayout, LayerType


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.relu(nn.Dense(6, name="up")(x)))
        return nn.Dense(4, name="head")(x)


class Inside(nn.Module):
    """A model that has methods of its layer intercepted itself."""

    @nn.compact
    def __call__(self, x):
        with nn.intercept_methods(times(5.0)):
            return nn.Dense(6, name="up")(x)


class Dropping(nn.Module):
    """A layer of a user's own, with a module inside."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 6))
        return nn.Dropout(0.5, deterministic=True, name="none")(x @ kernel)


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Dropping(name="up")(x)


CONFIGS = {
    "a": {"r": 3, "target_modules": ["up"], "modules_to_save": ["norm"]},
    "b": {"r": 3, "target_modules": ["head"], "modules_to_save": ["up"]},
}
OWN = {"layer_types": {Dropping: LayerType(KernelLayout("i o"))}}
MODELS = {"layers": (Net, {}), "inside": (Inside, {}), "own": (Own, OWN)}


def times(factor, seen=None):
    """What scales what every layer returns, and what is inside of one."""

    def intercept(call, args, kwargs, context):
        place = type(context.module).__name__, context.method_name
        if seen is not None:
            seen.append(place)
        out = call(*args, **kwargs)
        kinds = "Dense", "LayerNorm", "Dropping", "Dropout"
        return out * factor if place[0] in kinds else out

    return intercept


def adapted(kind):
    net, rules = MODELS[kind]
    return wrapped(net(), X, sample_inputs=(X,), **rules)


@pytest.mark.parametrize("kind", MODELS)
def test_each_method_is_intercepted_once_around_layer_and_adapter(kind):
    model = adapted(kind)
    module, variables = adapted(kind).merge_and_unload().unbind()
    for factor in (2.0, 3.0):
        seen, expected = [], []
        with nn.intercept_methods(times(factor, expected)):
            plain = module.apply(variables, X)
        with nn.intercept_methods(times(factor, seen)):
            close(model(X), plain)
        assert seen == expected
        with nn.intercept_methods(times(factor)):  # its trace is not that of another factor
            close(jax.jit(model.apply)(model.variables, X), plain)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_that_are_asked_for_later_see_what_was_intercepted(kind):
    model = adapted(kind)
    module, variables = adapted(kind).merge_and_unload().unbind()

    def slope(apply, variables):
        def loss(x):
            with nn.intercept_methods(times(3.0)):
                return (apply(variables, x) ** 2).sum()

        return jax.grad(jax.jit(loss))(X)

    close(slope(model.apply, model.variables), slope(module.apply, variables))


def test_rows_with_adapters_of_their_own():
    """A kernel that one adapts and another trains whole, and a norm trained whole."""
    model, bound = linen_rows.adapted(Net(), CONFIGS, X)
    names = ["a", "b", "__base__", "a", "b"]
    with nn.intercept_methods(times(3.0)):
        each = linen_rows.alone(model, bound, X)
        found = model(X, adapter_names=names)
    close(found, np.stack([each[name][i] for i, name in enumerate(names)]))
