"""nnx modules inside linen ones (``nnx.bridge.ToLinen``): their layers run with W + delta."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from linen_nets import CONFIG, X, assert_runs_as_merged, close, slopes, wrapped

from randlora_jax import ConfigError, KernelLayout, LayerType

pytestmark = [
    pytest.mark.filterwarnings("error:Found unknown module paths"),
    pytest.mark.filterwarnings("ignore:the adapter leaves out"),
]


@pytest.fixture(autouse=True)
def no_mesh_needed():
    """Metadata that names mesh axes, on no mesh: as code bases on this bridge set it."""
    before = flax.config.flax_always_shard_variable
    flax.config.update("flax_always_shard_variable", False)
    yield
    flax.config.update("flax_always_shard_variable", before)


class Part(nnx.Module):
    """Layers, a list of them, a bare kernel, statistics and dropout."""

    def __init__(self, *, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        self.up = nnx.Linear(8, 12, kernel_init=init, rngs=rngs)  # in a box
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.more = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.bare = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (8, 8)))
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, train=False):
        x = self.norm(x, use_running_average=not train)
        x = self.drop(self.down(nnx.relu(self.up(x))), deterministic=not train)
        for layer in self.more:
            x = x + nnx.tanh(layer(x))
        return x @ self.bare[...]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nnx.bridge.to_linen(Part, name="part")(nn.Dense(8, name="first")(x), train=train)
        return nnx.bridge.to_linen(nnx.Linear, 8, 3, name="last")(x)


LAYERS = ["first", "last", "part.bare", "part.down", "part.more.0", "part.more.1", "part.up"]
VIEWS = {"part/bare": "i o"}


@pytest.mark.parametrize("sample", [None, (X,)])
def test_layers_inside_are_adapted(sample):
    model = wrapped(Net(), X, views=VIEWS, sample_inputs=sample)
    assert sorted(model.targeted_module_names) == LAYERS
    assert_runs_as_merged(model, X)


@pytest.mark.parametrize("only", ["part.up", "part.down", "last"])
def test_a_single_layer_inside_is_not_taken_for_the_module_around_it(only):
    config = dataclasses.replace(CONFIG, target_modules=[only])
    model = wrapped(Net(), X, sample_inputs=(X,), config=config)
    assert_runs_as_merged(model, X)


def test_statistics_and_draws_are_the_plain_models():
    model = wrapped(Net(), X, views=VIEWS)
    rngs = {"dropout": jax.random.key(5), "params": jax.random.key(6)}
    run = {"train": True, "rngs": rngs, "mutable": ["batch_stats"]}
    found, changed = model.apply(model.variables, X, **run)
    assert all(np.any(g) for g in jax.tree.leaves(slopes(model, X, **run)))
    module, variables = model.merge_and_unload().unbind()
    close((found, changed), module.apply(variables, X, **run))


class General(nnx.Module):
    """A code base's own layer, of any number of out axes."""

    def __init__(self, n_in, features, axes, *, rngs):
        init = nnx.initializers.normal(0.3)
        self.kernel = nnx.Param(init(rngs.params(), (n_in, *features)), out_sharding=axes)

    def __call__(self, x):
        return jnp.tensordot(x, self.kernel[...], 1)


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.query = General(8, (2, 4), ("embed", "heads", "kv"), rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(self.query(x).reshape(x.shape))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nnx.bridge.to_linen(Layer, name="layer")(x), None


class Decoder(nn.Module):
    """Layers scanned along axis 1, boxed and rematerialised."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 3}
        scan = nn.scan(nn.remat(Scanned), metadata_params={nn.PARTITION_NAME: "layers"}, **axes)
        return nn.Dense(5, name="logits")(scan(name="layers")(x, None)[0])


STATED = {"layers/layer/query": "i s o o", "layers/layer/mlp": "i s o"}
TYPES = {General: lambda m: LayerType(KernelLayout("i" + "o" * (m.kernel.ndim - 1)))}


@pytest.mark.parametrize(
    "rules",
    [{"views": STATED}, {"sample_inputs": (X,), "layer_types": TYPES}],
    ids=["said", "told"],
)
def test_scanned_along_axis_1(rules):
    model = wrapped(Decoder(), X, **rules)
    assert len(model.targeted_module_names) == 7
    assert_runs_as_merged(model, X)


class Transposed(nnx.Module):
    def __init__(self, *, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (6, 8)))

    def __call__(self, x):
        return x @ self.kernel[...].T


class Held(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.to_linen(Transposed, name="odd")(x)


def test_a_layout_that_nothing_tells_is_asked_for():
    model = wrapped(Held(), X)
    with pytest.raises(ConfigError, match=r"'odd' is a Transposed, whose kernel layout is unknown"):
        model.apply(model.variables, X)
    assert_runs_as_merged(wrapped(Held(), X, views={"odd": "o i"}), X)
