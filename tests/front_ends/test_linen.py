"""The linen front end: where its arrays live, and linen's and optax's idioms unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from randlora_jax import ConfigError, RandLoraConfig, TargetError, get_peft_model


class Block(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, _=None):
        hidden = nn.relu(nn.Dense(16, name="up")(x))
        hidden = nn.Dropout(self.rate, deterministic=not self.has_rng("dropout"))(hidden)
        return x + nn.Dense(8, name="down")(hidden), None


class Net(nn.Module):
    """Compact style, and one block called twice."""

    @nn.compact
    def __call__(self, x):
        block = Block(name="block")
        x, _ = block(x)
        x, _ = block(x)
        return nn.Dense(3, name="head")(x)

    def features(self, x):
        return x


class Stack(nn.Module):
    """Scanned and rematerialised layers, in setup style."""

    def setup(self):
        scanned = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=3,
        )
        self.layers = scanned()
        self.head = nn.Dense(3)

    def __call__(self, x):
        x, _ = self.layers(x, None)
        return self.head(x)


CONFIG = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up", "down"])
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32)
MODELS = [Net, Stack]
STACKED = {"layers/.*": "s i o"}


def bound(make):
    module = make()
    return module.bind(module.init(jax.random.key(0), X))


def wrapped(make=Net, config=CONFIG, **kwargs):
    views = STACKED if make is Stack else None
    return get_peft_model(bound(make), config, views=views, **kwargs)


def moved(variables):
    noise = np.random.default_rng(1)
    return {
        **variables,
        "randlora": jax.tree.map(
            lambda x: x + noise.normal(0, 0.3, x.shape).astype("f"), variables["randlora"]
        ),
    }


def bases_in(tree):
    return [x for x in jax.tree.leaves(tree) if x.dtype == jnp.bfloat16]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("apply", ["auto", "factored", "merged"])
def test_before_training_it_is_the_base_model_to_the_bit(make, apply):
    model = wrapped(make, apply=apply)
    module, variables = bound(make).unbind()
    np.testing.assert_array_equal(model.apply(model.variables, X), module.apply(variables, X))
    np.testing.assert_array_equal(
        jax.jit(model.apply)(model.variables, X), jax.jit(module.apply)(variables, X)
    )


@pytest.mark.parametrize("make", MODELS)
def test_ways_to_apply_agree(make):
    outs = []
    for apply in ("factored", "merged", "auto"):
        model = wrapped(make, apply=apply)
        outs.append(model.apply(moved(model.variables), X))
    base = model.apply(model.variables, X)
    assert np.std(outs[0] - base) > 0.1 * np.std(base)
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], rtol=1e-5, atol=1e-5 * np.abs(outs[0]).max())


@pytest.mark.parametrize("make", MODELS)
def test_bases_are_held_once_and_enter_jit_as_arguments(make, tmp_path):
    model = wrapped(make)
    variables = moved(model.variables)
    assert len(bases_in(variables)) == 2
    lowered = jax.jit(model.apply).lower(variables, X)
    text = lowered.as_text()
    inputs = text.split("func.func public @main", 1)[1].split("{\n", 1)[0].split("->")[0]
    assert inputs.count("xbf16>") == 2
    assert not [line for line in text.splitlines() if 'constant dense<"' in line]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", variables)
    with ocp.StandardCheckpointer() as checkpointer:
        back = checkpointer.restore(tmp_path / "state", variables)
    assert len(bases_in(back)) == 2
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("make", MODELS)
def test_a_train_state_sees_only_the_trained_leaves(make):
    model = wrapped(make)
    frozen = dict(model.variables)
    state = TrainState.create(
        apply_fn=model.apply, params=frozen.pop("randlora"), tx=optax.adamw(1e-2)
    )
    before = jax.tree.map(np.asarray, frozen)

    @jax.jit
    def step(state, frozen, x):
        def loss(trained):
            return (state.apply_fn({**frozen, "randlora": trained}, x) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(20):
        state, value = step(state, frozen, X)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    assert model.get_nb_trainable_parameters()[0] == trained
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * trained
    model.variables = {**frozen, "randlora": state.params}
    np.testing.assert_array_equal(
        model.apply(model.variables, X), model.apply({**frozen, "randlora": state.params}, X)
    )


def test_vmap_forward_mode_and_a_block_called_twice():
    model = wrapped()
    variables = moved(model.variables)

    def loss(trained, x):
        return (model.apply({**variables, "randlora": trained}, x) ** 2).sum()

    whole = jax.grad(loss)(variables["randlora"], X)
    each = jax.vmap(jax.grad(loss), (None, 0))(variables["randlora"], X[:, None])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-3, atol=1e-3), each, whole
    )
    tangent = jax.jvp(lambda t: loss(t, X), (variables["randlora"],), (whole,))[1]
    squares = sum(float((g**2).sum()) for g in jax.tree.leaves(whole))
    np.testing.assert_allclose(tangent, squares, rtol=1e-4)


def test_a_stack_is_its_layers_one_by_one():
    """Lambda and gamma of a scanned stack act layer by layer, each on its own slice."""
    model = wrapped(Stack)
    variables = moved(model.variables)
    x = X
    layers, deltas = variables["params"]["layers"], model.delta_weights()
    model.variables = variables
    deltas = model.delta_weights()
    for i in range(3):
        up = layers["up"]["kernel"][i] + deltas[f"layers.{i}.up"].T
        down = layers["down"]["kernel"][i] + deltas[f"layers.{i}.down"].T
        hidden = jax.nn.relu(x @ up + layers["up"]["bias"][i])
        x = x + hidden @ down + layers["down"]["bias"][i]
    head = variables["params"]["head"]
    expected = x @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-4, atol=1e-4)


def test_a_deeper_stack_is_no_larger_a_program():
    """Stacked layers share one copy of the bases, and are compiled once however many there are."""

    class Deep(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            axes = {"params": 0}
            scanned = nn.scan(
                Block, variable_axes=axes, split_rngs={"params": True}, length=self.depth
            )
            return scanned(name="layers")(x, None)[0]

    sizes, shared = [], []
    for depth in (2, 32):
        module = Deep(depth)
        net = module.bind(module.init(jax.random.key(0), X))
        model = get_peft_model(net, CONFIG, views=STACKED)
        frozen = dict(model.variables)
        trained = frozen.pop("randlora")

        def loss(trained, frozen, model=model):
            return (model.apply({**frozen, "randlora": trained}, X) ** 2).mean()

        text = jax.jit(jax.grad(loss)).lower(trained, frozen).as_text()
        sizes.append(text.count("\n"))
        shared.append([x.shape for x in jax.tree.leaves(frozen["randlora_bases"])])
    assert sizes[0] == sizes[1] and shared[0] == shared[1]


@pytest.mark.parametrize("make", MODELS)
def test_adapter_dropout_is_on_exactly_with_a_dropout_rng(make):
    config = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up"], randlora_dropout=0.5)
    model, plain = (
        wrapped(make, config),
        wrapped(make, RandLoraConfig(**{**vars(config), "randlora_dropout": 0.0})),
    )
    variables = moved(model.variables)
    run = lambda seed: model.apply(variables, X, rngs={"dropout": jax.random.key(seed)})  # noqa: E731
    assert not np.allclose(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))
    expected = plain.apply({**plain.variables, "randlora": variables["randlora"]}, X)
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-5, atol=1e-5)
    # inverted dropout keeps the mean: over many draws of the adapter's share
    one = wrapped(
        Net, RandLoraConfig(r=3, randlora_alpha=6, target_modules=["head"], randlora_dropout=0.5)
    )
    many = moved(one.variables)
    draws = jax.vmap(lambda k: one.apply(many, X, rngs={"dropout": k}))(
        jax.random.split(jax.random.key(0), 4000)
    )
    calm, base = one.apply(many, X), one.apply(one.variables, X)
    assert np.abs(draws.mean(0) - calm).max() < 0.1 * np.abs(calm - base).max()


def test_wholly_trained_modules_keep_their_frozen_original():
    config = RandLoraConfig(
        r=3, target_modules=["up"], modules_to_save=["head"], bias="randlora_only"
    )
    model = wrapped(config=config)
    trained = model.variables["randlora"]["default"]
    assert set(trained["head"]) == {"kernel", "bias"}
    assert set(trained["block"]) == {"up"} and "bias" in trained["block"]["up"]
    base = model.apply(model.variables, X)
    trained["head"]["bias"] = trained["head"]["bias"] + 1.0
    after = model.apply({**model.variables, "randlora": {"default": trained}}, X)
    np.testing.assert_allclose(after, base + 1, rtol=1e-5)


class Odd(nn.Module):
    """A layer of the user's own: (out, in), and a nonlinearity inside."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (6, x.shape[-1]))
        return jnp.tanh(x @ kernel.T)


class Holder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Odd(name="odd")(x)


def test_a_layer_type_of_the_users_own_needs_a_stated_view():
    config = RandLoraConfig(r=3, randlora_alpha=6, target_modules=["odd"])
    unstated = get_peft_model(bound(Holder), config)
    with pytest.raises(ConfigError, match=r"odd.*state it"):
        unstated.apply(unstated.variables, X)
    model = get_peft_model(bound(Holder), config, views={"odd": "o i"})
    variables = moved(model.variables)
    model.variables = variables
    kernel = variables["params"]["odd"]["kernel"] + model.delta_weights()["odd"]
    np.testing.assert_allclose(model.apply(variables, X), jnp.tanh(X @ kernel.T), rtol=1e-5)
    insisting = get_peft_model(bound(Holder), config, views={"odd": "o i"}, apply="factored")
    with pytest.raises(ConfigError, match=r"cannot run with its adapters.*not known to be a sum"):
        insisting.apply(insisting.variables, X)


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(ConfigError, match="bind"):
        get_peft_model(Net(), CONFIG)
    with pytest.raises(ConfigError, match="cannot wrap a dict"):
        get_peft_model({}, CONFIG)
    with pytest.raises(ConfigError, match="apply='fast'"):
        get_peft_model(bound(Net), CONFIG, apply="fast")
    with pytest.raises(TargetError):
        get_peft_model(bound(Net), RandLoraConfig(target_modules=["nothing"]))
    with pytest.raises(ConfigError, match="view"):
        get_peft_model(bound(Net), CONFIG, views={"block/up": "x y"})


@pytest.mark.parametrize("make", MODELS)
def test_it_is_called_as_the_bound_module_is(make):
    model = wrapped(make)
    np.testing.assert_array_equal(model(X), bound(make)(X))
    model.variables = moved(model.variables)
    np.testing.assert_array_equal(model(X), model.apply(model.variables, X))
    assert not np.allclose(model(X), bound(make)(X))


def test_split_parts_what_trains_from_all_else():
    model = wrapped()
    trained, frozen = model.split()
    assert set(trained) == {"default"} and set(frozen) == {
        "params",
        "randlora_frozen",
        "randlora_bases",
        "randlora_specs",
    }
    numbers = sum(x.size for x in jax.tree.leaves(trained))
    assert numbers == model.get_nb_trainable_parameters()[0]
    whole = {**frozen, "randlora": trained}
    assert jax.tree.structure(whole) == jax.tree.structure(model.variables)
    np.testing.assert_array_equal(model.apply(whole, X), model(X))


def test_it_says_what_it_is():
    first, adapter = repr(wrapped()).splitlines()
    assert first.startswith("LinenRandLora of Net: ")
    assert "'default' (active, trained): r 3, alpha 6, 2 layers" in adapter


@pytest.mark.parametrize("dtype, tile", [("int8", None), ("nf4", 4)])
def test_a_layer_quantised_by_qwix_changes_by_x_delta(dtype, tile):
    qwix = pytest.importorskip("qwix")
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=dtype, tile_size=tile)
    net = nn.Sequential([nn.Dense(6)])
    quantised = qwix.quantize_model(net, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(quantised.init, jax.random.key(0), X)["params"]
    params = qwix.quantize_params(net.init(jax.random.key(0), X)["params"], shapes)
    before = quantised.apply({"params": params}, X)
    config = RandLoraConfig(r=3, target_modules="all-linear", init_weights=False)
    bound = quantised.bind({"params": params})
    model = get_peft_model(bound, config, rngs=jax.random.key(1))
    expected = X @ model.delta_weights()["layers_0"].T
    np.testing.assert_allclose(model(X) - before, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="float update cannot join"):
        model.merge_adapter()


def test_splitting_what_is_frozen_tells_that_nothing_trains():
    """As a model that was opened without is_trainable is."""
    model = get_peft_model(Net().bind(Net().init(jax.random.key(0), X)), CONFIG)
    model.set_adapter("default", inference_mode=True)
    with pytest.warns(UserWarning, match=r"'default' is applied, and frozen.*is_trainable=True"):
        assert model.split()[0] == {}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"rngs": {"dropout": jax.random.key(1)}}, r"rngs of \['dropout'\] and mutable=False"),
        ({"mutable": ["stats"]}, r"rngs of \[\] and mutable=\['stats'\]"),
    ],
)
def test_what_a_module_is_bound_with_for_its_calls_is_no_part_of_the_model(more, found):
    net = Block(0.5)
    variables = net.init(jax.random.key(0), X)
    with pytest.raises(ConfigError, match=f"{found}: pass module.bind"):
        get_peft_model(net.bind(variables, **more), CONFIG)
    model, drops = get_peft_model(net.bind(variables), CONFIG), {"dropout": jax.random.key(1)}
    expected, _ = net.bind(variables, rngs=drops)(X)
    np.testing.assert_array_equal(model(X, rngs=drops)[0], expected)
