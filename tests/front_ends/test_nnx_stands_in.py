"""To the code of its model a wrapper is the module in whose place it stands."""

import copy
import functools
import pickle
from collections.abc import Sized

import jax
import numpy as np
import pytest
from flax import nnx
from nnx_nets import CONFIG, X, changed, close, drawn, gradients

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

VIEWS = {"attn/(wq|wo)": "i o"}


def wrapped(make, **config):
    config = RandLoraConfig(r=4, target_modules="all-linear", init_weights=False, **config)
    return get_peft_model(make(), config, rngs=nnx.Rngs(1), views=VIEWS if make is Private else {})


class Asking(nnx.Module):
    """Does with each layer what its class says."""

    def __init__(self):
        linear = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))
        self.layers = nnx.List([*linear, nnx.LayerNorm(8, rngs=nnx.Rngs(2))])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nnx.Linear):
                x = nnx.relu(x)
            match layer:
                case nnx.LayerNorm():
                    x = x[:, :4]
            x = after(layer, x)
        return x


@functools.singledispatch
def after(layer, x):
    raise TypeError


@after.register
def _(layer: nnx.Linear, x):
    return x + 1


@after.register
def _(layer: nnx.LayerNorm, x):
    return x - 1


COPIES = {
    "itself": lambda m: m,
    "split and merged": lambda m: nnx.merge(*nnx.split(m)),
    "cloned": nnx.clone,
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_model_that_asks_for_classes_is_the_same_model(way):
    model = COPIES[way](wrapped(Asking, modules_to_save=["layers.2"]))
    close(model(X), changed(Asking, model)(X))
    close(nnx.jit(lambda m, x: m(x))(model, X), changed(Asking, model)(X))
    with model.disable_adapter():
        np.testing.assert_array_equal(model(X), Asking()(X))


def test_a_layer_is_of_its_class_and_the_wrapper_comes_off():
    model = wrapped(Asking)
    layer = model.model.layers[0]
    assert isinstance(layer, nnx.Linear) and layer.__class__ is nnx.Linear
    assert not isinstance(layer, nnx.Conv | nnx.List | nnx.Variable)
    assert type(copy.copy(layer)) is type(layer) is not nnx.Linear
    assert [type(x) for x in model.merge_and_unload().layers[:2]] == [nnx.Linear] * 2


@pytest.mark.parametrize("kind", [nnx.List, nnx.Dict])
def test_a_model_that_is_a_container_of_kernels(kind):
    def make():
        return type("Whole", (kind,), {"__call__": call})([w] if kind is nnx.List else {"0": w})

    def call(self, x):
        return x @ self[0 if kind is nnx.List else "0"][...]

    w = drawn(0, 8, 8)
    model = get_peft_model(make(), CONFIG, rngs=nnx.Rngs(1), views={"0": "i o"})
    (delta,) = model.delta_weights().values()
    close(model(X), X @ (w[...] + delta.T))
    model.merge_adapter()
    close(model(X), X @ (w[...] + delta.T))
    model.unmerge_adapter()
    close(model.unload()(X), X @ w[...])


class Query(nnx.Variable):
    pass


class Queries(nnx.Module):
    """Layers that are called with a Variable."""

    def __init__(self):
        self.query = Query(X)
        self.proj = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.proj(self.query) * x + self.norm(self.query)


@pytest.mark.filterwarnings("ignore:the adapter leaves out")
def test_a_variable_is_an_input():
    model = wrapped(Queries, modules_to_save=["norm"])
    plain = changed(Queries, model)
    close(model(X), plain(X))
    close(nnx.jit(lambda m, x: m(x))(model, X), plain(X))
    close(model(X, adapter_names=["default"] * 5), plain(X))
    slope = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, Query))
    close(slope(model)["model"]["query"][...], slope(plain)["query"][...])


class Attention(nnx.Module):
    def __init__(self):
        self.wq, self.wo, self._scale = drawn(0, 8, 8), drawn(1, 8, 8), 0.5
        self._seen = nnx.Variable(np.zeros(()))

    def _project(self, x):
        return x @ self.wq[...]

    @property
    def _both(self):
        return self.wq[...] @ self.wo[...]

    def __call__(self, x):
        return self._project(x) @ self.wo[...] * self._scale


class Private(nnx.Module):
    """Reads and sets what its module keeps to itself."""

    def __init__(self):
        self.attn = Attention()

    def _project(self, x):
        return self.attn._project(x)

    def __call__(self, x):
        self.attn._scale = 2.0
        self.attn._seen[...] += 1
        return self.attn(x) + self._project(x) * self.attn._scale + x @ self.attn._both


def test_private_names_of_a_module_are_its_own():
    model = wrapped(Private)
    plain = changed(Private, model)
    close(model(X), plain(X))
    attn = model.model.attn
    assert attn._scale == attn.base_layer._scale == 2 and attn._seen[...] == 1
    close(model._project(X), plain._project(X))
    close(model.attn._project(X), plain._project(X))
    model._noticed = attn._noticed = 3
    assert model.model._noticed == attn.base_layer._noticed == 3
    del attn._noticed
    for one in (attn, attn.base_layer):
        with pytest.raises(AttributeError, match="'Attention' object has no attribute '_noticed'"):
            one._noticed  # noqa: B018
    with pytest.raises(AttributeError, match="'Private' object has no attribute '_absent'"):
        model._absent  # noqa: B018


class Kernels(nnx.Module):
    """Its items are its kernels; as a truth it is false."""

    def __init__(self):
        self.wq, self.wo = drawn(0, 8, 8), drawn(1, 8, 8)

    def __call__(self, x):
        for w in self:
            x = nnx.tanh(x @ w)
        return x

    def __iter__(self):
        yield from (self.wq[...], self.wo[...])

    def __len__(self):
        return 2

    def __contains__(self, name):
        return name == "wq"

    def __bool__(self):
        return False


class Walking(nnx.Module):
    def __init__(self):
        self.attn = Kernels()

    def __call__(self, x):
        assert "wq" in self.attn and "wo" not in self.attn and not self.attn
        for w in self.attn:
            x = x @ w
        return x * len(self.attn) + self.attn(x)


def test_items_of_a_module_are_counted_walked_and_found():
    model = get_peft_model(Walking(), CONFIG, rngs=nnx.Rngs(1), views=VIEWS)
    assert len(model.delta_weights()) == 2
    expected = changed(Walking, model)(X)
    close(model(X), expected)
    close(nnx.jit(lambda m, x: m(x))(model, X), expected)
    close(pickle.loads(pickle.dumps(model))(X), expected)
    assert all(g.any() for g in jax.tree.leaves(gradients(model, lambda m, x: m(x))))
    with pytest.raises(ConfigError, match="cannot run with adapters by row"):
        model(X, adapter_names=["default"] * 5)
    assert len(list(model.model.attn)) == len(list(model.attn)) == 2 and not model.attn
    other = wrapped(Asking)
    assert other.layers[0] and not isinstance(other.model.layers[0], Sized)
