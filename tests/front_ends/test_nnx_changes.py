"""What an nnx module changes of itself in its call is changed as without adapters, or refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import ConfigError, KernelLayout, LayerType, RandLoraConfig, get_peft_model

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)


class Busy(nnx.Module):
    """A state of every kind, and an output that depends on all of them."""

    def __init__(self):
        self.a = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))
        self.b = nnx.Param(jax.random.normal(jax.random.key(1), (8, 8)))
        self.bias = nnx.Param(jnp.zeros(8))
        self.first, self.calls = True, 0
        self.cache = nnx.Cache({"sum": jnp.zeros(8)})
        self.seen = nnx.Variable(jnp.zeros(()))
        self.items = nnx.List([nnx.Variable(jnp.ones(()))])
        self.last = nnx.data({"x": jnp.zeros(())})

    def __call__(self, x):
        self.calls += 1
        scale, self.first = (1.0 if self.first else 2.0), False
        self.cache["sum"] = self.cache["sum"] + x.sum(0)
        self.cache[f"call {self.calls}"] = x.mean()
        self.seen = nnx.Variable(self.seen[...] + 1)
        self.items.append(nnx.Variable(x.max()))
        self.last["x"] = self.last["x"] + x.min()
        if self.calls == 2:
            del self.seen
        much = self.cache["sum"] + sum(item[...] for item in self.items) + self.last["x"]
        return scale * ((x + much) @ self.a[...] @ self.b[...] + self.bias[...])


class Net(nnx.Module):
    def __init__(self):
        self.up, self.busy = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), Busy()

    def __call__(self, x):
        return self.busy(self.up(x))


def attributes(module):
    found = {name: x for name, x in vars(module).items() if not name.startswith("_pytree__")}
    return jax.tree.map(jax.device_get, nnx.to_pure_dict(nnx.state(module))), {
        name: x for name, x in found.items() if isinstance(x, bool | int)
    }


WAYS = {
    "adapted": ({"target_modules": ["busy.a", "busy.b"]}, {"views": {"busy/(a|b)": "i o"}}),
    "trained whole": ({"target_modules": ["up"], "modules_to_save": ["busy"]}, {}),
    "bias": ({"target_modules": ["up"], "bias": "all"}, {}),
    "both": ({"target_modules": ["busy.a"], "bias": "all"}, {"views": {"busy/a": "i o"}}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", [lambda m, x: m(x), nnx.jit(lambda m, x: m(x))])
def test_it_is_what_the_base_model_becomes(way, run):
    fields, stated = WAYS[way]
    net = Net()
    model = get_peft_model(Net(), RandLoraConfig(r=3, **fields), **stated)
    for x in (X, 2 * X):
        np.testing.assert_allclose(run(model, x), run(net, x), rtol=1e-4, atol=1e-4)
    busy = model.unload().busy
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        *(attributes(x)[0] for x in (busy, net.busy)),
    )
    assert attributes(busy)[1] == attributes(net.busy)[1]
    assert busy.calls == 2 and len(busy.items) == 3 and not hasattr(busy, "seen")


def test_gradients_of_what_it_changes():
    fields, stated = WAYS["adapted"]
    config = RandLoraConfig(r=3, init_weights=False, **fields)
    model = get_peft_model(Net(), config, rngs=nnx.Rngs(1), **stated)
    deltas = model.delta_weights()
    net = Net()
    for name, delta in deltas.items():
        leaf = getattr(net.busy, name.removeprefix("busy."))
        leaf[...] = leaf[...] + delta.T

    def twice(model, x):
        return (model(x) + model(x)).sum()

    kernels = nnx.DiffState(0, nnx.PathContains("up"))
    mine = jax.tree.leaves(nnx.grad(twice, argnums=kernels)(model, X))
    theirs = jax.tree.leaves(nnx.grad(twice, argnums=kernels)(net, X))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


class Noted(nnx.Linear):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        self.sow(nnx.Intermediate, "seen", x)
        return super().__call__(self.perturb("p", x))


class Noting(nnx.Module):
    def __init__(self):
        self.up = Noted(8, 6, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(6, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def noting(**stated):
    config = RandLoraConfig(r=3, target_modules="all-linear", init_weights=False)
    return get_peft_model(Noting(), config, rngs=nnx.Rngs(1), **stated)


def test_a_layer_that_runs_alone_and_changes_an_attribute_is_refused_by_name():
    with pytest.raises(ConfigError, match="a Noted changes its 'calls' when it is called"):
        noting(layer_types={Noted: LayerType(KernelLayout("i o"))})(X)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this flax has no nnx.capture")
def test_what_it_sows_is_captured():
    stated = {Noted: LayerType(KernelLayout("i o"), call=None)}
    model, net = noting(layer_types=stated), Noting()
    deltas = model.delta_weights()
    for name, delta in deltas.items():
        leaf = getattr(net, name).kernel
        leaf[...] = leaf[...] + delta.T
    (_, seen), (_, expected) = (nnx.capture(m, nnx.Intermediate)(X) for m in (model, net))
    np.testing.assert_array_equal(
        seen["model"]["up"]["base_layer"]["seen"][0], expected["up"]["seen"][0]
    )

    def grads(model, x):
        zeros = nnx.capture(model, nnx.Perturbation)(x)[1]

        def loss(model, zeros, x):
            out, _ = nnx.capture(lambda model, x: model(x), nnx.Intermediate, init=zeros)(model, x)
            return (out**2).sum()

        return jax.tree.leaves(nnx.grad(loss, argnums=1)(model, zeros, x))

    np.testing.assert_allclose(grads(model, X), grads(net, X), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this flax has no nnx.capture")
def test_outputs_of_methods_are_captured_with_their_adapters():
    net = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.relu)
    config = RandLoraConfig(r=3, target_modules="all-linear", init_weights=False)
    model = get_peft_model(net, config, rngs=nnx.Rngs(1))
    look = nnx.capture(lambda model, x: model(x), nnx.Intermediate, method_outputs=nnx.Intermediate)
    out, seen = look(model, X)
    inner = seen["model"]["layers"][0]["__call__"][0]
    np.testing.assert_array_equal(nnx.relu(inner), out)
    np.testing.assert_array_equal(model(X), out)  # and nothing is left of it


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(8, name="dense")(x))


class Outer(nnx.Module):
    def __init__(self):
        self.inner = nnx.bridge.ToNNX(Inner(), nnx.Rngs(0)).lazy_init(X)

    def __call__(self, x):
        return self.inner(x, mutable=["batch_stats"])


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["norm"]}])
def test_statistics_of_linen_inside_nnx(fields):
    net = Outer()
    model = get_peft_model(Outer(), RandLoraConfig(r=3, target_modules="all-linear", **fields))
    for x in (X, 2 * X):
        np.testing.assert_allclose(model(x), net(x), rtol=1e-4, atol=1e-4)
    mine, theirs = (m.inner.norm["mean"][...] for m in (model.unload(), net))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    assert theirs.any()


def test_a_method_called_on_its_own_changes_the_module():
    config = RandLoraConfig(r=3, target_modules=["up"], bias="all")
    model = get_peft_model(Decoding(), config)
    model.attention.init_cache((1, 4, 8))
    net = Decoding()
    net.attention.init_cache((1, 4, 8))
    for x in (X[:1, None], 2 * X[:1, None]):
        np.testing.assert_allclose(model(x), net(x), rtol=1e-4, atol=1e-5)
    assert model.unload().attention.cache_index[...] == 2


class Decoding(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.attention(self.up(x))


class Whole(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.up(x))


def test_what_is_written_into_a_module_trained_whole_is_what_runs():
    config = RandLoraConfig(r=3, target_modules=["up"], modules_to_save=["head"])
    model = get_peft_model(Whole(nnx.Rngs(0)), config)
    off, before = model.model.head.base_layer.kernel[...], model(X)
    model.model.head.kernel[...] = model.model.head.kernel[...] * 2
    model.head.bias[...] = jnp.ones(4)
    np.testing.assert_allclose(model(X), 2 * before + 1, rtol=1e-5, atol=1e-5)
    other = Whole(nnx.Rngs(5))
    nnx.update(model.model, nnx.state(other))
    np.testing.assert_allclose(model(X), other(X), rtol=1e-5, atol=1e-5)
    model.model.head.bias = nnx.Param(np.ones(4, np.float32))
    np.testing.assert_allclose(model(X), other(X) + 1, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.model.head.base_layer.kernel[...], off)
    np.testing.assert_array_equal(model.model.head.base_layer.bias[...], 0)
