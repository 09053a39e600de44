"""The nnx front end: where its arrays live, and flax's and optax's idioms unchanged."""

import inspect
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.variables import SharedBasis


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class Net(nnx.Module):
    """Blocks in a list."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(8, rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def features(self, x):
        return self.blocks[0](x)


class Tied(Net):
    """One block reached by two attributes."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.alias = self.blocks[0]

    def __call__(self, x):
        return super().__call__(self.alias(x))


class Stack(nnx.Module):
    """Layers stacked by vmap and run by a user's own unmodified scan, rematerialised."""

    def __init__(self, rngs, depth=3):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(8, rngs)

        self.layers = create(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def body(x, block):
            return block(x)

        return self.head(body(x, self.layers))


CONFIG = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up", "down"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
MODELS = [Net, Stack]


def wrapped(make=Net, config=CONFIG, moved=True, **kwargs):
    model = get_peft_model(make(nnx.Rngs(0)), config, **kwargs)
    if moved:
        for i, leaf in enumerate(jax.tree.leaves(nnx.state(model, AdapterParam))):
            assert leaf.dtype == jnp.float32, i
        state = nnx.state(model, AdapterParam)
        noise = np.random.default_rng(1)
        nnx.update(
            model, jax.tree.map(lambda x: x + noise.normal(0, 0.3, x.shape).astype("f"), state)
        )
    return model


def test_a_deeper_stack_is_no_larger_a_program():
    """Stacked layers share one copy of the bases, and are compiled once however many there are."""
    sizes, shared = [], []
    for depth in (2, 32):
        model = get_peft_model(Stack(nnx.Rngs(0), depth), CONFIG)
        graph, state = nnx.split(model)

        @jax.jit
        def gradient(state, graph=graph):
            loss = lambda m: (m(X) ** 2).mean()  # noqa: E731
            return nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(nnx.merge(graph, state))

        sizes.append(gradient.lower(state).as_text().count("\n"))
        shared.append([x.shape for x in bases_in(jax.tree.leaves(state))])
    assert sizes[0] == sizes[1] and shared[0] == shared[1] and len(shared[0]) == 2


def bases_in(leaves):
    return [x for x in leaves if getattr(x, "dtype", None) == jnp.bfloat16]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_before_training_it_is_the_base_model_to_the_bit(make, apply):
    expected = make(nnx.Rngs(0))(X)
    np.testing.assert_array_equal(wrapped(make, moved=False, apply=apply)(X), expected)
    model = wrapped(make, moved=False, apply=apply)
    np.testing.assert_array_equal(
        nnx.jit(lambda m, x: m(x))(model, X), nnx.jit(lambda m, x: m(x))(make(nnx.Rngs(0)), X)
    )


@pytest.mark.parametrize("make", MODELS)
def test_ways_to_apply_agree(make):
    outs = [wrapped(make, apply=apply)(X) for apply in ("factored", "merged", "auto")]
    base = make(nnx.Rngs(0))(X)
    assert np.std(outs[0] - base) > 0.1 * np.std(base)
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-5, atol=1e-5 * np.abs(outs[0]).max())


@pytest.mark.parametrize("make", MODELS)
def test_bases_are_held_once(make, tmp_path):
    model = wrapped(make)
    assert len(bases_in(jax.tree.leaves(model))) == 2
    _, bases, rest = nnx.split(model, SharedBasis, ...)
    assert len(jax.tree.leaves(bases)) == 2 and not bases_in(jax.tree.leaves(rest))
    assert len(bases_in(jax.tree.leaves(nnx.split(model)[1]))) == 2
    # in a checkpoint too
    state = nnx.split(model)[1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state))
    assert len(bases_in(jax.tree.leaves(back))) == 2
    jax.tree.map(np.testing.assert_array_equal, back, nnx.to_pure_dict(state))


@pytest.mark.parametrize("make", MODELS)
def test_every_kind_of_jit_takes_the_bases_as_arguments(make):
    model = wrapped(make)
    expected = model(X)
    graph, state = nnx.split(model)

    def pure(state, x):
        return nnx.merge(graph, state)(x)

    def direct(model, x):
        return model(x)

    runs = {
        "jax.jit of split state": jax.jit(pure).lower(state, X),
        "jax.jit of the module": jax.jit(direct).lower(model, X),
        "nnx.jit": nnx.jit(direct).lower(model, X),
    }
    for name, lowered in runs.items():
        text = lowered.as_text()
        # two bf16 inputs, and no bf16 constant of more than one element
        header = text.split("func.func public @main", 1)[1].split("{\n", 1)[0]
        inputs = header.split("->")[0]
        assert inputs.count("xbf16>") == 2, (name, inputs)
        constants = [line for line in text.splitlines() if 'constant dense<"' in line]
        assert not constants, (name, constants)
    # flax 0.12.2 has no such argument yet
    no_graph = {"graph": False} if "graph" in inspect.signature(nnx.jit).parameters else {}
    for f in (nnx.jit(direct), nnx.jit(direct, **no_graph), jax.jit(direct)):
        np.testing.assert_allclose(f(model, X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(pure)(state, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_an_optimizer_sees_only_the_trained_leaves(make):
    model = wrapped(make, moved=False)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=AdapterParam)
    frozen = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(AdapterParam))))

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return (model(x) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, X)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(AdapterParam)))
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.tree.map(np.asarray, after))
    moments = [x for x in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if x.ndim]
    trained = jax.tree.leaves(nnx.state(model, AdapterParam))
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained)
    assert model.get_nb_trainable_parameters()[0] == sum(x.size for x in trained)


def test_grad_vmap_split_and_merge():
    model = wrapped()
    graph, trained, rest = nnx.split(model, AdapterParam, ...)

    def loss(trained, x):
        return (nnx.merge(graph, trained, rest)(x) ** 2).sum()

    whole = jax.grad(loss)(trained, X)
    each = jax.vmap(jax.grad(loss), (None, 0))(trained, X[:, None])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=1e-4), each, whole
    )
    forward = jax.jvp(lambda t: loss(t, X), (trained,), (whole,))[1]
    squares = sum(float((g**2).sum()) for g in jax.tree.leaves(whole))
    np.testing.assert_allclose(forward, squares, rtol=1e-4)


def test_a_module_reached_twice_is_adapted_once():
    model = wrapped(Tied)
    assert isinstance(model.model.alias.up, RandLoraLayer)
    assert model.model.alias.up is model.model.blocks[0].up
    assert len(model.delta_weights()) == 4
    assert not np.allclose(model(X), Tied(nnx.Rngs(0))(X))


def test_other_methods_run_in_scope_and_parts_refuse():
    model = wrapped()
    base = Net(nnx.Rngs(0))
    assert not np.allclose(model.features(X), base.features(X))
    with pytest.raises(ConfigError, match="outside its RandLoraModel"):
        model.model.blocks[0](X)


class Pair(nnx.Module):
    """Two models that are wrapped one by one, the second of which calls the first."""

    def __init__(self, first):
        self.first = first
        self.up = nnx.Linear(3, 40, rngs=nnx.Rngs(2))

    def __call__(self, x):
        return self.up(self.first(x))


def test_each_wrapped_model_has_bases_of_its_own_in_a_call():
    """The inner model's pair is smaller, and of another adapter, than that of the model around."""
    inner = wrapped()
    expected = inner(X)
    outer = get_peft_model(
        Pair(inner), RandLoraConfig(r=3, target_modules="up|none", projection_prng_key=9)
    )
    np.testing.assert_array_equal(outer.model.up.base_layer(expected), outer(X))
    assert set(outer.randlora_bases) != set(inner.randlora_bases)
    other = wrapped(config=replace(CONFIG, projection_prng_key=9))
    other.model.blocks = inner.model.blocks  # layers of one model in another's call
    with pytest.raises(ConfigError, match=r"'blocks.0.up' slices .* another RandLoraModel's"):
        other(X)


class Chain(Net):
    """Calls another model like itself, and its own layers before and after."""

    other = None

    def __call__(self, x):
        if self.other is None:
            return super().__call__(x)
        first, second = self.blocks
        return first(x) + self.other(x).sum() + second(x)


def test_models_that_are_alike_keep_apart_when_one_calls_the_other():
    """Their tokens are equal, and ``nnx.jit`` may even exchange them."""
    models = [wrapped(Chain) for _ in range(2)]
    run = nnx.jit(lambda model, x: model(x))
    for i, model in enumerate(models):
        for layer in nnx.state(model, AdapterParam).flat_state().leaves:
            layer.set_value(layer[...] + i)
        run(model, X)
    outer, inner = models
    alone = [np.asarray(inner(X)), *(np.asarray(block(X)) for block in outer.blocks)]
    outer.model.other = inner
    for call in (run, lambda model, x: model(x)):
        expected = alone[1] + alone[0].sum() + alone[2]
        np.testing.assert_allclose(call(outer, X), expected, rtol=1e-5)
    inside = nnx.state(inner, AdapterParam)
    outer.set_adapter("default", inference_mode=True)  # takes nothing of the inner one's
    assert len(jax.tree.leaves(nnx.state(inner, AdapterParam))) == len(jax.tree.leaves(inside))
    assert len(jax.tree.leaves(nnx.state(outer, AdapterParam))) == len(jax.tree.leaves(inside))


class Picking(nnx.Module):
    """Needs the very numbers of an argument besides its input."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(rngs.normal((8, 6)))

    def __call__(self, x, columns):
        return (x @ self.kernel[...])[:, columns.tolist()]


class Picked(nnx.Module):
    def __init__(self, rngs):
        self.up = Picking(rngs)

    def __call__(self, x):
        return self.up(x, np.array([3, 1])) + self.up(x, np.array([0, 2]))


def test_numpy_arguments_stay_what_they_are_under_jit():
    model = wrapped(Picked, RandLoraConfig(r=3, target_modules=["up"]), views={"up": "i o"})
    graph, state = nnx.split(model)
    found = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X)
    kernel = Picked(nnx.Rngs(0)).up.kernel[...] + model.delta_weights()["up"].T
    y = X @ kernel
    np.testing.assert_allclose(found, y[:, [3, 1]] + y[:, [0, 2]], rtol=1e-4, atol=1e-5)


def test_it_says_what_it_is_without_its_arrays():
    model = wrapped()
    model.add_adapter("second", CONFIG)
    assert str(model) == repr(model)
    first, default, second = repr(model).splitlines()
    assert first.startswith("NnxRandLora of Net: ")
    numbers = model.get_nb_trainable_parameters()[0]
    assert "'default' (active, trained): r 3, alpha 6, 4 layers" in default
    assert f"{numbers:,} numbers" in default and "'second' (not active)" in second
    assert "Array" not in repr(model) and "Param" not in repr(model)


def test_it_can_be_pickled_and_trained_on():
    model = wrapped()
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy(X), model(X))
    slope = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, AdapterParam))
    assert all(g.any() for g in jax.tree.leaves(slope(copy)))
    copy.merge_adapter()
    copy.unmerge_adapter()
    np.testing.assert_array_equal(copy(X), model(X))


def test_dropout_is_seeded_and_off_in_eval():
    config = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up"], randlora_dropout=0.5)
    model = wrapped(config=config, rngs=nnx.Rngs(5))
    model.train()
    first, second = model(X), model(X)
    assert not np.allclose(first, second)
    again = wrapped(config=config, rngs=nnx.Rngs(5))
    again.train()
    np.testing.assert_array_equal(again(X), first)
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    with pytest.raises(ConfigError, match="rngs"):
        wrapped(config=config)


def test_wholly_trained_modules_keep_their_frozen_original():
    config = RandLoraConfig(
        r=3, target_modules=["up"], modules_to_save=["head"], bias="randlora_only"
    )
    model = wrapped(config=config, moved=False)
    trained = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam))}
    assert trained == {
        "kernel",
        "bias",
    }  # by adapter, lambda and gamma of a kernel and whole leaves
    assert set(model.model.head.trained_leaves["default"]) == {"kernel", "bias"}
    assert set(model.model.blocks[0].up.trained_leaves["default"]) == {"bias"}
    assert isinstance(model.model.blocks[0].down, nnx.Linear)
    base = Net(nnx.Rngs(0))
    model.model.head.trained_leaves["default"]["bias"][...] += 1.0
    np.testing.assert_allclose(model(X), base(X) + 1, rtol=1e-5)
    np.testing.assert_array_equal(model.model.head.base_layer.bias[...], base.head.bias[...])


def test_it_says_which_way_it_takes():
    few, many = (wrapped().explain(tokens) for tokens in (1, 10_000))
    assert few.count("\n") == many.count("\n") == 1  # the two sizes of layer
    assert "(8 -> 16): forward: factored" in few
    assert "(8 -> 16): forward: W + delta_W" in many
