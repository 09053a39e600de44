"""Rows of one batch with adapters of their own, in nnx: what each adapter gives alone."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from many_nets import (
    IDS,
    NAMES,
    STRUCTURES,
    Bridged,
    Convolved,
    Net,
    Tanh,
    X,
    adapted,
    alone,
    by_row,
    each_alone,
    rotated,
    same_bits,
    same_rows,
    structured,
)
from nnx_nets import NETS

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model

CAPACITIES = [None, 5]  # of stacks; None where adapters are kept one by one


def ready(capacity):
    model = adapted()
    if capacity:
        model.stack_adapters(capacity, parts=2)
    return model, each_alone()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_each_row_is_what_its_adapter_gives_alone(capacity):
    model, each = ready(capacity)
    with model.disable_adapter():
        base = model(IDS)
    found = model(IDS, adapter_names=NAMES)  # operation by operation, as the base
    same_rows(found, each, NAMES)
    same_bits(found, base, NAMES)
    np.testing.assert_array_equal(model(IDS, adapter_names=["__base__"] * 4), base)
    for names in (*rotated(NAMES), *rotated(["d", "d", "__base__", "b"]), ["__base__"] * 4):
        same_rows(by_row(model, IDS, model.rows(names)), each, names)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_rows_do_not_touch_one_another(capacity):
    """A neighbour's adapter would be seen, and another order of rows is that order of outputs."""
    model, each = ready(capacity)
    out = np.asarray(by_row(model, IDS, model.rows(NAMES)))
    with pytest.raises(AssertionError):
        same_rows(by_row(model, IDS, model.rows([*NAMES[1:], NAMES[0]])), each, NAMES, 1e-2)
    order = np.array([2, 0, 3, 1])
    moved = by_row(model, IDS[order], model.rows([NAMES[i] for i in order]))
    np.testing.assert_allclose(moved, out[order], rtol=0, atol=1e-6 * np.abs(out).max())


def test_all_rows_alike_in_a_stack():
    model, each = ready(5)
    for name, out in alone(model, IDS).items():
        same_rows(out, each, [name] * 4)


@pytest.mark.parametrize(
    ("kind", "capacity"), [(kind, None if kind == "scan" else 5) for kind in STRUCTURES]
)
def test_in_models_of_any_structure(kind, capacity):
    names = ["b", "__base__", "a", "b"]
    model = structured(kind)
    each = alone(model, X)
    if capacity:
        model.stack_adapters(capacity)
    out, base = (by_row(model, X, model.rows(chosen)) for chosen in (names, ["__base__"] * 4))
    same_rows(out, each, names)
    same_bits(out, base, names)
    same_rows(base, each, ["__base__"] * 4)


def test_split_rematerialised_and_mapped():
    model, each = ready(5)
    rows = model.rows(NAMES)
    graph, state = nnx.split(model)
    pure = lambda state, ids, rows: nnx.merge(graph, state)(ids, adapter_names=rows)  # noqa: E731
    same_rows(jax.jit(jax.checkpoint(pure))(state, IDS, rows), each, NAMES)
    again = nnx.jit(nnx.remat(lambda model, ids, rows: model(ids, adapter_names=rows)))
    same_rows(again(model, IDS, rows), each, NAMES)
    one = lambda ids, slot: model(ids[None], adapter_names=slot)[0]  # noqa: E731
    same_rows(jax.jit(jax.vmap(one))(IDS, rows), each, NAMES)
    model.set_rows(NAMES)
    same_rows(jax.jit(pure)(nnx.state(model), IDS, None), each, NAMES)


class Said(nnx.Module):
    """Called by methods and parts, as encoders and decoders are."""

    def __init__(self):
        self.net = Net(nnx.Rngs(0))

    def say(self, ids):
        return self.net(ids)

    def words(self, ids):
        yield self.net(ids)

    def named(self, ids, adapter_names):
        return self.net(ids), adapter_names


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_methods_and_parts_take_adapter_names(capacity):
    model, each = adapted(Said()), each_alone()
    if capacity:
        model.stack_adapters(capacity)
    rows = model.rows(NAMES)
    for call in (model.say, model.net, lambda ids, **names: next(model.words(ids, **names))):
        same_rows(call(IDS, adapter_names=NAMES), each, NAMES)
        same_rows(call(IDS, adapter_names=rows), each, NAMES)
        same_rows(call(IDS), each, ["a"] * 4)
    found, names = model.named(IDS, adapter_names=NAMES)  # which asks for them itself
    same_rows(found, each, ["a"] * 4)
    assert names is NAMES
    for call in (model.say, model.net):
        with pytest.raises(ConfigError, match="no adapter named 'x'"):
            call(IDS, adapter_names=["x"] * 4)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_mapped_over_rows_of_batches_of_one(capacity):
    model, each = ready(capacity)
    one = lambda model, ids, slot: model(ids[None], adapter_names=slot[None])[0]  # noqa: E731
    mapped = nnx.jit(nnx.vmap(one, in_axes=(None, 0, 0)))
    same_rows(mapped(model, IDS, model.rows(NAMES)), each, NAMES)


@pytest.mark.parametrize("kind", ["a kernel that is read", "three kernels", "methods"])
def test_any_model_runs_row_by_row_under_vmap(kind):
    make, views, _ = NETS[kind]
    configs = {
        name: RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules="all-linear")
        for name, r in (("a", 2), ("b", 4), ("c", 4))
    }
    model, x = adapted(make(), configs, views=views), X[:, 0]
    each = alone(model, x)
    for capacity in CAPACITIES:
        if capacity:
            model.stack_adapters(capacity)
        with pytest.raises(ConfigError, match=r"jax\.vmap"):
            model(x, adapter_names=NAMES)
    one = lambda model, x, slot: model(x[None], adapter_names=slot)[0]  # noqa: E731
    mapped = nnx.jit(lambda model, x, rows: jax.vmap(partial(one, model))(x, rows))
    same_rows(mapped(model, x, model.rows(NAMES)), each, NAMES, 2e-6)


class Attending(nnx.Module):
    """An embedding that is the head as well, by a method or read by itself."""

    def __init__(self, reads):
        self.emb, self.up = nnx.Embed(11, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))
        self.reads = reads

    def __call__(self, ids):
        x = self.up(self.emb(ids))
        return x @ self.emb.embedding[...].T if self.reads else self.emb.attend(x)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_tied_head_that_is_trained_whole_follows_the_row(capacity):
    configs = {
        "a": RandLoraConfig(r=3, target_modules=["up"]),
        "b": RandLoraConfig(r=3, target_modules=["up"], modules_to_save=["emb"]),
    }
    model = adapted(Attending(reads=False), configs)
    each, names = alone(model, IDS), ["b", "a", "__base__", "b"]
    if capacity:
        model.stack_adapters(capacity)
    same_rows(by_row(model, IDS, model.rows(names)), each, names)
    model = adapted(Attending(reads=True), configs)
    each = alone(model, IDS)
    if capacity:
        model.stack_adapters(capacity)
        same_rows(by_row(model, IDS, jnp.int32(2)), each, ["b"] * 4)
    with pytest.raises(ConfigError, match="'embedding' of a Embed was read by itself"):
        model(IDS, adapter_names=names)


def test_a_layer_of_which_nothing_is_known_is_refused():
    """Its rows might be anything: experts see the tokens that a router sends them."""
    configs = {name: RandLoraConfig(r=2, target_modules="all-linear") for name in ("a", "b")}
    model = adapted(Convolved(Tanh), configs)
    with pytest.raises(ConfigError, match=r"'named.first'.*nothing is known.*jax.vmap over rows"):
        model(X, adapter_names=["a", "b", "__base__", "a"][: len(X)])


class Sent(nnx.Module):
    """Tokens of all rows in one axis, or sent to four experts, whose axis comes first."""

    def __init__(self, flat):
        self.layer = (
            nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            if flat
            else nnx.Einsum("ecd,edf->ecf", (4, 8, 8), (4, 1, 8), rngs=nnx.Rngs(0))
        )
        self.flat = flat

    def __call__(self, x):
        return self.layer(x.reshape(-1, 8)).reshape(x.shape) if self.flat else self.layer(x)


@pytest.mark.parametrize(
    ("flat", "match"),
    [(True, "'layer' was called with 20 rows"), (False, "the kernel has it, too")],
)
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_tokens_of_all_rows_in_one_axis_are_refused(flat, match, capacity):
    config = RandLoraConfig(r=2, target_modules="all-linear")
    model = adapted(Sent(flat), {"a": config, "b": config})
    if capacity:
        model.stack_adapters(capacity)
    with pytest.raises(ConfigError, match=match + r".*jax\.vmap over rows"):
        model(X, adapter_names=["a", "b", "__base__", "a"])


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_a_kernel_that_one_trained_whole_and_another_adapts(capacity):
    configs = {
        "a": RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up"], modules_to_save=["head"]),
        "b": RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up", "head"]),
    }
    model = adapted(configs=configs)
    each = alone(model, IDS)
    if capacity:
        model.stack_adapters(capacity)
    names = ["b", "__base__", "a", "b"]
    with model.disable_adapter():
        base = model(IDS)
    found = model(IDS, adapter_names=names)
    same_rows(found, each, names)
    same_bits(found, base, names)
    same_rows(by_row(model, IDS, model.rows(names)), each, names)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_linen_inside_nnx(capacity):
    one = RandLoraConfig(r=3, randlora_alpha=3, target_modules="all-linear")
    model = adapted(Bridged(), {"a": one, "b": replace(one, target_modules=["up", "after"])})
    each = alone(model, X)
    if capacity:
        model.stack_adapters(capacity)
        for name, out in alone(model, X).items():
            np.testing.assert_allclose(out, each[name], rtol=0, atol=1e-6 * np.abs(out).max())
    names = ["b", "__base__", "a", "b"]
    with model.disable_adapter():
        base = model(X)
    found = model(X, adapter_names=names)
    same_rows(found, each, names)
    same_bits(found, base, names)
    same_rows(by_row(model, X, model.rows(names)), each, names)


def test_what_a_bridge_trained_whole_cannot_follow_rows():
    config = RandLoraConfig(r=3, target_modules=["up"], bias="all")
    model = adapted(Bridged(), {"a": config, "b": config})
    with pytest.raises(ConfigError, match=r"bias.*linen module inside an nnx model.*jax\.vmap"):
        model(X, adapter_names=["a", "b", "a", "b"])


def test_names_of_rows_are_put_where_no_other_transfer_is_allowed():
    base = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    model = get_peft_model(base, RandLoraConfig(r=2, target_modules="all-linear"))
    model.stack_adapters(2)
    run, x = nnx.jit(lambda model, x, rows: model(x, adapter_names=rows)), jnp.ones((3, 8))
    names = ["default"] * 3
    expected = run(model, x, model.rows(names)), run(model, x, model.rows(names, scale=[1.0] * 3))
    with jax.transfer_guard("disallow"):
        found = run(model, x, model.rows(names)), run(model, x, model.rows(names, scale=[1.0] * 3))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
