"""Arrays in boxes that name their axes are adapted, and the boxes stay where they were."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import PartitionSpec as P
from linen_nets import CONFIG, RNGS, X, assert_runs_as_merged, close, wrapped

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

INIT = nn.initializers.lecun_normal()
LOGICAL = nn.with_logical_partitioning(INIT, ("embed", "mlp"))
PLACED = nn.with_partitioning(INIT, ("data", None))
RULES = (("embed", "data"), ("mlp", None), ("layers", None))


class Own(meta.AxisMetadata):
    """A box of the user's own."""

    def __init__(self, content):
        self.content = content

    def unbox(self):
        return self.content

    def replace_boxed(self, val):
        return Own(val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


jax.tree_util.register_pytree_node(Own, lambda box: ((box.content,), None), lambda _, x: Own(*x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8, kernel_init=LOGICAL, name="dense")(x)), None


class Net(nn.Module):
    """A boxed stack along axis 1, a boxed layer of another kind, a boxed and a plain head."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 3}
        scan = functools.partial(nn.scan, metadata_params={nn.PARTITION_NAME: "layers"}, **axes)
        x, _ = scan(nn.remat(Block))(name="layers")(x, None)
        own = nn.Dense(8, kernel_init=lambda *args: Own(INIT(*args)), name="own")
        return nn.Dense(3, name="head")(nn.Dense(8, kernel_init=PLACED, name="placed")(own(x)))


VIEWS = {"layers/dense": "i s o"}


def boxes(tree):
    found = jax.tree.map(lambda x: (type(x), getattr(x, "names", None)), tree, is_leaf=is_box)
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))


def is_box(leaf):
    return isinstance(leaf, meta.AxisMetadata)


def test_boxed_kernels_are_adapted_and_stay_boxed():
    model = wrapped(Net(), X, views=VIEWS)
    before = boxes(model.module.init(RNGS, X)["params"])
    assert {kind.__name__ for kind, _ in before} >= {"LogicallyPartitioned", "Partitioned", "Own"}
    assert boxes(model.variables["params"]) == before
    model.merge_adapter()
    assert boxes(model.variables["params"]) == before
    model.unmerge_adapter()
    assert boxes(model.variables["params"]) == before
    again = wrapped(Net(), X, views=VIEWS)
    assert_runs_as_merged(again, X)
    assert boxes(again.variables["params"]) == before


def test_sharding_rules_apply_to_all_variables():
    model = wrapped(Net(), X, views=VIEWS)
    specs = nn.get_partition_spec(model.variables)
    assert specs["params"]["layers"]["dense"]["kernel"] == P("embed", "layers", "mlp")
    assert set(jax.tree.leaves(specs["randlora"])) == {P()}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    placed = jax.device_put(nn.unbox(model.variables), nn.unbox(shardings))
    expected = model.apply(model.variables, X)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        close(jax.jit(model.apply)(model.variables, X), expected)
        close(jax.jit(model.apply)(placed, X), expected)


def test_modules_trained_whole_and_files(tmp_path):
    config = RandLoraConfig(
        r=4, target_modules=["dense"], modules_to_save=["placed"], init_weights=False
    )
    model = wrapped(Net(), X, config=config, views=VIEWS)
    trained, frozen = model.split()
    kernel = trained["default"]["placed"]["kernel"]
    assert isinstance(kernel, jax.Array)
    trained["default"]["placed"]["kernel"] = kernel + 1
    model.variables = {**frozen, "randlora": trained}
    expected = model.apply(model.variables, X)
    model.save_pretrained(tmp_path)
    bound = model.module.bind(model.module.init(RNGS, X))
    again = RandLoraModel.from_pretrained(bound, tmp_path, views=VIEWS)
    close(again.apply(again.variables, X), expected)
    merged = again.merge_and_unload()
    close(merged(X), expected)
    assert boxes(merged.variables["params"]) == boxes(bound.variables["params"])


@pytest.mark.parametrize("box", ["logical", "own"])
def test_a_params_pytree_keeps_its_boxes(box):
    array = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    held = Own(array) if box == "own" else nn.LogicallyPartitioned(array, ("embed", "mlp"))
    params = {"mlp": {"up": {"kernel": held}, "gate": jnp.ones((8, 6))}}
    views = {"mlp/up": "i o", "mlp/gate": "i o"}
    model = get_peft_model(params, CONFIG, rngs=jax.random.key(1), views=views)
    assert sorted(model.targeted_module_names) == ["mlp.gate", "mlp.up"]
    found = model.merged(model.variables)
    assert boxes(found) == boxes(params)
    close(found["mlp"]["up"]["kernel"], array + model.delta_weights()["mlp.up"].T)
    close(model.merge_and_unload(), found)
