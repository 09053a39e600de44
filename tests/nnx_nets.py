"""nnx models that do all sorts of things with their kernels; holding one to W + delta."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax import (
    AdapterParam,
    KernelLayout,
    LayerType,
    RandLoraConfig,
)

X = jax.random.normal(jax.random.key(2), (5, 8))
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear", init_weights=False)


def drawn(seed, *shape):
    return nnx.Param(nnx.Rngs(seed).normal(shape))


class Gated(nnx.Module):
    """Three kernels of one module."""

    def __init__(self):
        self.gate, self.up, self.down = drawn(0, 8, 16), drawn(1, 8, 16), drawn(2, 16, 8)

    def __call__(self, x):
        return (nnx.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Contained(nnx.Module):
    """Kernels in containers."""

    def __init__(self):
        self.listed = nnx.List([drawn(0, 8, 8), drawn(1, 8, 8)])
        self.named = nnx.data({"in": drawn(2, 8, 6), "out": drawn(3, 6, 8)})

    def __call__(self, x):
        for kernel in self.listed:
            x = nnx.tanh(x @ kernel[...])
        return x @ self.named["in"][...] @ self.named["out"][...]


class Called(nnx.Module):
    """Containers that are called as a module's one kernel is."""

    def __init__(self):
        self.w = nnx.List([drawn(0, 8, 8), drawn(1, 8, 8)])
        self.kernel = nnx.Dict({"in": drawn(2, 8, 6), "out": drawn(3, 6, 8)})

    def __call__(self, x):
        for kernel in self.w:
            x = nnx.tanh(x @ kernel[...])
        return x @ self.kernel["in"][...] @ self.kernel["out"][...]


class Read(nnx.Module):
    """A layer whose kernel others read, by its name or through a property."""

    def __init__(self):
        self.proj = Proj(nnx.Rngs(0))

    def __call__(self, x):
        return x @ self.proj.kernel[...] + x @ self.proj.transposed.T


class Proj(nnx.Linear):
    def __init__(self, rngs):
        super().__init__(8, 8, use_bias=False, rngs=rngs)

    @property
    def transposed(self):
        return self.kernel[...].T


class Methods(nnx.Module):
    """Methods that are not the call, one of them with an einsum string first."""

    def __init__(self):
        self.w = drawn(0, 8, 2, 4)
        self.inner = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def project(self, equation, *, inputs):
        return jnp.einsum(equation, nnx.relu(self.inner(inputs)), self.w[...]), len(equation)


class CallsMethods(nnx.Module):
    def __init__(self):
        self.q = Methods()

    def __call__(self, x):
        y, length = self.q.project("bi,ihd->bhd", inputs=x)
        assert type(length) is int
        return y


class Counting(nnx.Module):
    """A kernel, a count of calls, what was seen, and an argument that the call fills in."""

    def __init__(self):
        self.kernel = drawn(0, 8, 8)
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, cache):
        self.count[...] += 1
        self.seen = nnx.Intermediate(x.sum())
        y = x @ self.kernel[...]
        cache[...] = y
        return y


class Counted(nnx.Module):
    def __init__(self):
        self.layer, self.cache = Counting(), nnx.Cache(jnp.zeros((5, 8)))

    def __call__(self, x):
        return nnx.tanh(self.layer(x, self.cache)) + self.cache[...]


class Tanh(nnx.Linear):
    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


class Subclass(nnx.Module):
    def __init__(self):
        self.dense = Tanh(8, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x)


class Keyword(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(8, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(out_sharding=None, inputs=x)


class Nested(nnx.Module):
    """A layer with a kernel and a layer inside."""

    def __init__(self):
        self.outer = Outer()

    def __call__(self, x):
        return self.outer(x)


class Outer(nnx.Module):
    def __init__(self):
        self.kernel, self.inner = drawn(0, 8, 8), nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return nnx.relu(self.inner(x)) @ self.kernel[...]


class Rooted(nnx.Module):
    """The model itself holds a kernel."""

    def __init__(self):
        self.w = drawn(0, 8, 8)

    def __call__(self, x):
        return x @ self.w[...]


class Beside(nnx.Linear):
    """A known layer with another kernel beside its own."""

    def __init__(self):
        super().__init__(8, 8, rngs=nnx.Rngs(0))
        self.more = drawn(1, 8, 8)

    def __call__(self, x):
        return super().__call__(x) + jnp.tanh(x @ self.more[...])


MLP = {"mlp/(gate|up)": "i o", "mlp/down": "i o"}
NETS = {
    "three kernels": (lambda: Holding(Gated()), MLP, 3),
    "one rule for all": (lambda: Holding(Gated()), {"mlp/.*": "i o"}, 3),
    "containers": (lambda: Holding(Contained()), {"mlp/(listed|named)/.*": "i o"}, 4),
    "containers called as a kernel": (lambda: Holding(Called()), {"mlp/(w|kernel)/.*": "i o"}, 4),
    "a kernel that is read": (Read, {}, 1),
    "methods": (CallsMethods, {"q/w": "i o o"}, 2),
    "state": (Counted, {"layer": "i o"}, 1),
    "a subclass": (Subclass, {}, 1),
    "an input by keyword": (Keyword, {}, 1),
    "a layer inside": (Nested, {"outer": "i o"}, 2),
    "a layer inside, of known call": (
        Nested,
        {"layer_types": {Outer: LayerType(KernelLayout("i o"), call=None)}},
        2,
    ),
    "a kernel beside a layer's": (lambda: Holding(Beside()), {"mlp/more": "i o"}, 2),
    "the model's own kernel": (Rooted, {"w": "i o"}, 1),
}


class Holding(nnx.Module):
    def __init__(self, mlp):
        self.mlp = mlp

    def __call__(self, x):
        return self.mlp(x)


def changed(make, model):
    """The plain model with delta in its kernels."""
    plain, deltas = make(), model.delta_weights()
    found = dict(nnx.to_flat_state(nnx.state(plain, nnx.Param)))
    for layer in model._registry.layers.values():
        kernel = found[layer.kernel_path]
        kernel[...] += layer.layout.to_kernel(deltas[layer.name].T, kernel.shape)
    nnx.update(plain, nnx.from_flat_state(found))
    return plain


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def gradients(model, run):
    loss = lambda m: (run(m, X) ** 2).sum()  # noqa: E731
    return nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
