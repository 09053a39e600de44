"""Whatever an nnx model does with its kernels is done with W + delta, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from nnx_nets import (
    CONFIG,
    NETS,
    Counted,
    Counting,
    Gated,
    Holding,
    Keyword,
    X,
    changed,
    close,
    gradients,
)

from randlora_jax import (
    AdapterParam,
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)


@pytest.fixture(params=NETS)
def net(request):
    make, stated, count = NETS[request.param]
    return make, stated if "layer_types" in stated else {"views": stated}, count


def test_it_is_w_plus_delta_in_every_way(net, tmp_path):
    make, stated, count = net
    model = get_peft_model(make(), CONFIG, rngs=nnx.Rngs(1), **stated)
    expected = changed(make, model)(X)
    assert np.std(expected - make()(X)) >= 0.1 * np.std(expected)
    close(model(X), expected)
    close(nnx.jit(lambda m, x: m(x))(model, X), expected)
    close(nnx.jit(nnx.remat(lambda m, x: m(x)))(model, X), expected)
    model.save_pretrained(tmp_path)
    again = RandLoraModel.from_pretrained(make(), tmp_path, is_trainable=True, **stated)
    close(again(X), expected)

    grads = gradients(model, lambda m, x: m(x))
    assert len(jax.tree.leaves(grads)) == 2 * count and all(g.any() for g in jax.tree.leaves(grads))
    jitted = gradients(again, nnx.jit(lambda m, x: m(x)))
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, jitted)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(X), make()(X))
    close(model.merge_and_unload()(X), expected)


def test_before_training_it_is_the_base_model_to_the_bit(net):
    make, stated, _ = net
    config = RandLoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(make(), config, **stated)
    np.testing.assert_array_equal(model(X), make()(X))


def test_what_a_call_changes_stays_changed():
    model = get_peft_model(Counted(), CONFIG, rngs=nnx.Rngs(1), views={"layer": "i o"})
    run = nnx.jit(lambda m, x: m(x))
    model(X), run(model, X), run(model, X)
    layer = model.layer
    assert layer.count[...] == 3
    close(layer.seen[...], X.sum())
    close(model.cache[...], X @ changed(Counted, model).layer.kernel[...])


def test_a_layer_of_known_call_that_changes_its_state_is_refused():
    types = {Counting: LayerType(KernelLayout("i o"))}
    model = get_peft_model(Counted(), CONFIG, rngs=nnx.Rngs(1), layer_types=types)
    with pytest.raises(ConfigError, match=r"changes its .* state its type without its call"):
        model(X)


class EncoderDecoder(nnx.Module):
    def __init__(self):
        self.encoder = nnx.List([nnx.Linear(8, 12, rngs=nnx.Rngs(i)) for i in range(1)])
        self.decoder = nnx.Linear(12, 6, rngs=nnx.Rngs(3))

    def decode(self, x):
        return self.decoder(x)


def test_parts_run_with_their_adapters():
    model = get_peft_model(EncoderDecoder(), CONFIG, rngs=nnx.Rngs(1))
    plain = changed(EncoderDecoder, model)
    expected = plain.decode(plain.encoder[0](X))
    close(model.decoder(model.encoder[0](X)), expected)
    close(model.decode(next(iter(model.encoder))(X)), expected)
    close(nnx.jit(lambda m, x: m.decoder(m.encoder[0](x)))(model, X), expected)
    assert len(model.encoder) == 1 and model.decoder.in_features == 12
    with pytest.raises(ConfigError, match=r"'decoder' was called outside.*attributes"):
        model.model.decoder(jnp.ones((1, 12)))


class Branching(nnx.Module):
    def __init__(self):
        self.text, self.vision = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in (0, 1))

    def __call__(self, x, image=None):
        return self.text(x) if image is None else self.text(x) + self.vision(image)


def test_a_layer_that_is_not_reached_is_named():
    model = get_peft_model(Branching(), CONFIG, rngs=nnx.Rngs(1))
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        with pytest.raises(ConfigError, match=r"'vision' did not run.*optional=.*target_modules"):
            run(model, X)
    model(X, X)  # once it was reached, it may rest
    model(X)
    model = get_peft_model(Branching(), CONFIG, rngs=nnx.Rngs(1), optional=["vis.*"])
    model(X)
    model = get_peft_model(Branching(), RandLoraConfig(r=4, target_modules=["text"]))
    model(X)
    model.add_adapter("both", CONFIG, rngs=nnx.Rngs(2))
    model.set_adapter("both")
    with pytest.raises(ConfigError, match="'vision' did not run"):
        model(X)


class Tied(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in (0, 1))
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class Normed(nnx.Module):
    def __init__(self):
        self.outer = nnx.WeightNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(self.outer(x))


class Integers(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Variable(jnp.ones((8, 8), jnp.int8))

    def __call__(self, x):
        return x @ self.kernel[...]


@pytest.mark.parametrize(
    "make, stated, words",
    [
        (Tied, {}, ["'first'", "second.kernel", "Leave it out"]),
        (Normed, {}, ["outer.layer_instance", "WeightNorm", "another kernel"]),
        (lambda: Holding(Integers()), {"views": {"mlp": "i o"}}, ["'mlp'", "int8", "layer_types="]),
        (lambda: Holding(Gated()), {"views": {"mlp/gat": "i o"}}, ["'mlp/gat'", "mlp/gate"]),
        (Keyword, {"names": {"dens": "x"}}, ["names", "'dens'", "'dense'"]),
        (Keyword, {"optional": ["dens"]}, ["optional", "'dens'", "'dense'"]),
        (Keyword, {"layer_types": {Gated: LayerType(KernelLayout("i o"))}}, ["Gated", "no module"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(make, stated, words):
    with pytest.raises((ConfigError, TargetError)) as caught:
        get_peft_model(make(), CONFIG, rngs=nnx.Rngs(1), **stated)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stated", [True, False])
def test_layers_stacked_along_any_axis(axis, stated):
    def make():
        return nnx.vmap(
            lambda key: nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(key)), out_axes=axis
        )(jax.random.split(jax.random.key(0), 3))

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = make()

        def __call__(self, x):
            step = lambda x, block: x + nnx.tanh(block(x))  # noqa: E731
            return nnx.scan(step, in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)(x, self.blocks)

    views = {"blocks": ("s i o", "i s o", "i o s")[axis]} if stated else None
    model = get_peft_model(Net(), CONFIG, rngs=nnx.Rngs(1), views=views)
    expected, kernels = X, jnp.moveaxis(make().kernel[...], axis, 0)
    for i in range(3):
        kernel = kernels[i] + model.delta_weights()[f"blocks.{i}"].T
        expected = expected + nnx.tanh(expected @ kernel)
    close(model(X), expected)
    assert all(g.any() for g in jax.tree.leaves(gradients(model, lambda m, x: m(x))))
    close(model.merge_and_unload()(X), expected)


@pytest.mark.parametrize("dtype, tile", [("int8", None), ("int4", 4), ("nf4", 4)])
def test_a_model_quantised_by_qwix_changes_by_x_delta(dtype, tile):
    qwix = pytest.importorskip("qwix")
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=dtype, tile_size=tile)
    quantised = qwix.quantize_model(Keyword(), qwix.PtqProvider([rule]), X)
    before = quantised(X)
    model = get_peft_model(quantised, CONFIG, rngs=nnx.Rngs(1))
    close(model(X) - before, X @ model.delta_weights()["dense"].T, 1e-4)
    assert all(g.any() for g in jax.tree.leaves(gradients(model, lambda m, x: m(x))))
    with pytest.raises(ConfigError, match="float update cannot join"):
        model.merge_adapter()


def test_a_lora_of_the_base_model_stays_frozen():
    base = nnx.Sequential(nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0)))
    model = get_peft_model(base, CONFIG, rngs=nnx.Rngs(1))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam))]
    assert len(paths) == 2 and all("randlora_" in str(path) for path in paths)
    merged = model.merge_and_unload()
    assert type(merged.layers[0].lora.lora_a) is nnx.LoRAParam


def counted():
    """A jitted call of a model; and a list that has one more whenever it is traced."""
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(model)
        return model(x)

    return run, traces


def test_to_and_fro_needs_no_new_program():
    run, traces = counted()
    model = get_peft_model(Keyword(), CONFIG, rngs=nnx.Rngs(1))
    model.add_adapter("two", CONFIG, rngs=nnx.Rngs(3))
    for name in ("default", "two") * 3:
        model.set_adapter(name)
        run(model, X)
        with model.disable_adapter():
            np.testing.assert_array_equal(run(model, X), nnx.jit(lambda m, x: m(x))(Keyword(), X))
    assert len(traces) == 3 and model._registry.training == ("two",)


def test_merging_the_same_again_needs_no_new_program():
    run, traces = counted()
    model = get_peft_model(Keyword(), CONFIG, rngs=nnx.Rngs(1))
    apart = np.asarray(run(model, X))
    for _ in range(3):
        model.merge_adapter()
        merged = run(model, X)
        model.unmerge_adapter()
        np.testing.assert_array_equal(run(model, X), apart)
    assert len(traces) == 2
    before = jax.tree.map(jnp.copy, nnx.state(model, AdapterParam))
    nnx.update(model, jax.tree.map(lambda x: 2 * x, before))
    model.merge_adapter()  # other numbers
    assert np.abs(run(model, X) - merged).max() > 0.01
    model.unmerge_adapter()
    nnx.update(model, before)
    np.testing.assert_array_equal(run(model, X), apart)


class Tempered(nnx.Module):
    def __init__(self, held):
        self.up, self.held = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), held

    def __call__(self, x):
        held = self.held.get_value()
        return self.up(x) * held if isinstance(self.held, nnx.Param) else self.up(x)


@pytest.mark.parametrize(
    "held",
    [
        lambda: nnx.Variable(2),
        lambda: nnx.Variable({"n": jnp.zeros(()), "m": [jnp.ones((2, 2))]}),
        lambda: nnx.Variable({}),
        lambda: nnx.Variable((1, 2.5)),
        lambda: nnx.Param(1.5),
    ],
)
def test_a_variable_may_hold_anything(held):
    model = get_peft_model(Tempered(held()), CONFIG, rngs=nnx.Rngs(1))
    close(model(X), changed(lambda: Tempered(held()), model)(X))
    close(nnx.jit(lambda model, x: model(x))(model, X), model(X))
    assert model.get_nb_trainable_parameters()[1] and str(model.coverage())


class Scaled(nnx.Module):
    def __init__(self, scale):
        self.up, self.scale = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), Scale(scale)

    def __call__(self, x):
        return self.scale(self.up(x))


class Scale(nnx.Module):
    def __init__(self, held):
        self.held = nnx.Param(held)

    def __call__(self, x):
        held = self.held.get_value()
        return x @ held["w"] if isinstance(held, dict) else x * held


def test_a_number_in_a_param_trains_with_its_module():
    config = RandLoraConfig(r=2, target_modules=["up"], modules_to_save=["scale"])
    model = get_peft_model(Scaled(1.5), config)
    np.testing.assert_allclose(model(X), Scaled(1.5)(X), rtol=1e-6)
    assert gradients(model, lambda m, x: m(x))["model"]["scale"]["trained_leaves"]


def test_what_a_variable_holds_among_others_takes_no_adapter_and_is_named():
    whole = RandLoraConfig(r=2, target_modules=["up"], modules_to_save=["scale"])
    make = lambda: Scaled({"w": jnp.ones((6, 6))})  # noqa: E731
    with pytest.raises(ConfigError, match=r"'scale\.held\.w' is to be trained whole and is a part"):
        get_peft_model(make(), whole)
    with pytest.raises(TargetError, match=r"'scale\.held\.w'.*a part of what one Variable holds"):
        every = RandLoraConfig(r=2, target_modules="all-linear")
        get_peft_model(make(), every, views={"scale/held/w": "i o"})
    assert "scale/held/w" in str(
        get_peft_model(make(), RandLoraConfig(r=2, target_modules=["up"])).coverage()
    )


class Around(nnx.Module):
    """What users call as PEFT calls what its layers wrap."""

    def __init__(self):
        self.base_layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.other = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.base_layer(x) + self.other(x)


@pytest.mark.parametrize("saved", [None, ["base_layer"]])
def test_a_module_of_the_users_may_be_called_base_layer(saved, tmp_path):
    targets = ["other"] if saved else ["base_layer", "other"]
    config = RandLoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_weights=False)
    make = lambda: nnx.Dict(around=Around())  # noqa: E731
    model = get_peft_model(make(), config, rngs=nnx.Rngs(1))
    y, grads = model.around(X), gradients(model, lambda m, x: m.around(x))
    assert len(jax.tree.leaves(grads)) == 4
    if not saved:
        model.save_pretrained(tmp_path)
        close(RandLoraModel.from_pretrained(make(), tmp_path).around(X), y)
    close(model.merge_and_unload()["around"](X), y)
