"""Adapted kernels in whatever linen modules are made of: control flow, and modules handed about."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from linen_nets import X, assert_runs_as_merged, close, wrapped

INIT = nn.initializers.lecun_normal()


class Own(nn.Module):
    """Nobody knows what it computes."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(x @ self.param("kernel", INIT, (8, 8)))


class Branches(nn.Module):
    def setup(self):
        self.a, self.d = Own(), nn.Dense(8)

    def __call__(self, x):
        if self.is_initializing():
            return self.d(self.a(x))
        first, second = (lambda m, x: m.a(x)), (lambda m, x: m.d(x))
        x = nn.cond(x.sum() > -1e9, first, second, self, x)
        return nn.switch(jnp.int32(1), [first, second], self, x)


class Broadcast(nn.Module):
    @nn.compact
    def __call__(self, x):
        many = nn.vmap(Own, variable_axes={"params": None}, split_rngs={"params": False})
        return many(name="a")(x[:, None])


class Takes(nn.Module):
    """Calls a module that it is given with the call."""

    @nn.compact
    def __call__(self, module, x):
        return module(x) @ self.param("kernel", INIT, (8, 8))


class Argument(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Takes(name="t")(Own(name="a"), x)


class Holds(nn.Module):
    """Calls a module that others hold, too."""

    held: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.held(x) @ self.param("kernel", INIT, (8, 8))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = Own(name="a")
        return Holds(a, name="t")(x) + Holds(a, name="u")(x) + a(x)


class Getter(nn.Module):
    """Hands out a layer."""

    def setup(self):
        self.kernel, self.inner = self.param("kernel", INIT, (8, 8)), nn.Dense(8)

    def layer(self):
        return self.inner

    def __call__(self, x):
        return self.layer()(x) @ self.kernel


class Gets(nn.Module):
    def setup(self):
        self.a = Getter()

    def __call__(self, x):
        return self.a.layer()(self.a(x))


class Lifted(nn.Module):
    """Functions of a submodule under a transformation; one reads its kernel."""

    @nn.compact
    def __call__(self, x):
        a = Own(name="a")
        x = nn.remat(lambda module, x: module(x))(a, a(x))
        return x + nn.remat(lambda module, x: x @ module.get_variable("params", "kernel"))(a, x)


class Root(nn.Module):
    """The model itself holds kernels."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(8, name="d")(x)
        return hidden @ self.param("a", INIT, (8, 3)) + x @ self.param("t", INIT, (8, 3))


KINDS = {
    "branches": (Branches(), "a"),
    "broadcast": (Broadcast(), "a"),
    "a module as an argument": (Argument(), "[at]"),
    "a module that several hold": (Shared(), "[atu]"),
    "a module that is handed out": (Gets(), "a"),
    "functions under remat": (Lifted(), "a"),
    "the model itself": (Root(), "[at]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_merged(kind):
    net, rule = KINDS[kind]
    assert_runs_as_merged(wrapped(net, X, views={rule: "i o"}), X)


class Two(nn.Module):
    """Two kernels of one module, each called as if it were the only one."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(x @ self.param("kernel", INIT, (8, 8))) @ self.param("w", INIT, (8, 8))


class HoldsTwo(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Two(name="a")(x)


def test_two_kernels_of_one_module_are_two_layers():
    model = wrapped(HoldsTwo(), X, views={"a/(kernel|w)": "i o"})
    assert sorted(model.targeted_module_names) == ["a.kernel", "a.w"]
    assert_runs_as_merged(model, X)


class Loop(nn.Module):
    def setup(self):
        self.a, self.d = Own(), nn.Dense(8)

    def __call__(self, x):
        if self.is_initializing():
            return self.d(self.a(x))
        more, step = (lambda m, s: s[0] < 2), (lambda m, s: (s[0] + 1, m.a(m.d(s[1]))))
        return nn.while_loop(more, step, self, (0, x))[1]


def test_a_loop_without_a_gradient():
    model = wrapped(Loop(), X, views={"a": "i o"})
    found = model(X)
    close(found, model.merge_and_unload()(X))


def test_a_function_in_place_of_a_method():
    model = wrapped(Branches(), X, views={"a": "i o"})
    found = model.apply(model.variables, X, method=lambda module, x: module.a(x))
    merged = model.merge_and_unload().variables["params"]
    close(found, nn.tanh(X @ merged["a"]["kernel"]))
