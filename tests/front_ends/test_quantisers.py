"""What a quantiser makes of operations while its model runs, and what it leaves to train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantised_nets import (
    CONFIG,
    FRONT_ENDS,
    QUANTISE,
    LinenNet,
    Net,
    X,
    provider,
    qwix,
    samples,
    wrapped,
)

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model


def called(model):
    """(a function of the model's state and x, that state), for ``jit``."""
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return lambda state, x: nnx.merge(graph, state)(x), state
    return model.apply, model.variables


class One(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(64, 128, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.up(x)


class LinenOne(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(128, name="up")(x)


def one_layer(front_end, **more):
    if front_end == "nnx":
        return qwix.quantize_model(One(), provider("int8", **more), X)
    module = qwix.quantize_model(LinenOne(), provider("int8", **more))
    return module.bind(module.init(jax.random.key(0), X))


def with_adapter(base, front_end, apply):
    config = RandLoraConfig(r=8, randlora_alpha=16, target_modules=["up"], init_weights=False)
    return get_peft_model(base, config, rngs=jax.random.key(1), apply=apply, **samples(front_end))


def slopes(model, x):
    """Of lambda and gamma, where the gradient of the output is x's own first columns."""
    if isinstance(model, nnx.Module):
        loss = lambda model: (model(x)[:, :64] * x).sum()  # noqa: E731
        return jax.tree.leaves(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model))
    trained, frozen = model.split()
    run = lambda trained: model.apply({**frozen, "randlora": trained}, x)  # noqa: E731
    return jax.tree.leaves(jax.grad(lambda t: (run(t)[:, :64] * x).sum())(trained))


@FRONT_ENDS
@pytest.mark.parametrize("rows", [1, 5, 500])
@pytest.mark.parametrize("apply", ["factored", "merged"])
def test_what_adapters_multiply_is_not_rounded_as_activations_are(front_end, apply, rows):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, 64)), jnp.float32)
    base = one_layer(front_end, act_qtype="int8")
    plain = base(x)
    assert np.abs(plain - one_layer(front_end)(x)).max() > 1e-3, "the rule rounds nothing"
    model = with_adapter(base, front_end, apply)
    (delta,) = model.delta_weights().values()
    expected = x @ delta.T
    assert expected.std() > 0.1 * plain.std()
    np.testing.assert_allclose(model(x) - plain, expected, atol=1e-5 * np.abs(expected).max())

    twin = One() if front_end == "nnx" else LinenOne().bind(LinenOne().init(jax.random.key(0), x))
    theirs = slopes(with_adapter(twin, front_end, apply), x)
    for found, like in zip(slopes(model, x), theirs, strict=True):
        np.testing.assert_allclose(found, like, atol=1e-5 * np.abs(like).max())


@FRONT_ENDS
def test_models_that_a_quantiser_runs_otherwise_share_no_trace(front_end):
    """Their layers hold the same, but the activations of one model are rounded."""
    models = [wrapped(front_end, "int8", **more)[0] for more in ({}, {"act_qtype": "int8"})]
    outs = [jax.jit(run)(state, X) for run, state in map(called, models)]
    for model, out in zip(models, outs, strict=True):
        np.testing.assert_allclose(out, model(X), atol=1e-5)
    assert np.abs(outs[0] - outs[1]).max() > 1e-3


@FRONT_ENDS
@pytest.mark.parametrize("kind", ["int8", "nf4", "float8_e4m3fn"])
def test_a_gradient_through_a_compiled_call(front_end, kind):
    """It is taken when the call, and with it the quantiser's hold on operations, is over."""
    model, _ = wrapped(front_end, kind)
    run, state = called(model)
    loss = lambda x: (run(state, x) ** 2).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(jax.jit(loss))(X), jax.grad(loss)(X), rtol=1e-5, atol=1e-5)


@FRONT_ENDS
def test_integers_are_not_trained_whole(front_end, tmp_path):
    base = QUANTISE[front_end]("int8")
    whole = RandLoraConfig(r=8, randlora_alpha=16, target_modules=["up"], modules_to_save=["down"])
    said = r"modules_to_save=\('down',\).*'down.kernel'.*floats of 16 bits.*found int8"
    with pytest.raises(ConfigError, match=said):
        get_peft_model(base, whole, **samples(front_end))
    floats = Net() if front_end == "nnx" else LinenNet().bind(LinenNet().init(jax.random.key(0), X))
    names = {".*": r"\g<0>"}
    get_peft_model(floats, whole, names=names, **samples(front_end)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        RandLoraModel.from_pretrained(
            QUANTISE[front_end]("int8"), tmp_path, names=names, **samples(front_end)
        )


@FRONT_ENDS
def test_a_model_that_rounds_its_floats_while_it_runs_is_refused(front_end):
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    nothing = qwix.QuantizationRule(module_path="nowhere", weight_qtype="int8")
    for rounding in (qwix.QtProvider([rule]), qwix.PtqProvider([nothing])):
        if front_end == "nnx":
            base = qwix.quantize_model(Net(), rounding, X)
        else:
            numbers = LinenNet().init(jax.random.key(0), X)
            base = qwix.quantize_model(LinenNet(), rounding).bind(numbers)
        with pytest.raises(ConfigError, match=r"holds no quantised array.*QtProvider.*matches"):
            get_peft_model(base, CONFIG)


def test_a_part_that_rounds_its_floats_while_it_runs_is_refused():
    class Outer(nnx.Module):
        def __init__(self, part):
            self.part, self.head = part, nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    part = qwix.quantize_model(Net(), qwix.QtProvider([rule]), X)
    with pytest.raises(ConfigError, match="'part', a Net, was made by qwix"):
        get_peft_model(Outer(part), CONFIG)


def test_a_wrapped_model_is_not_quantised():
    model = get_peft_model(Net(), CONFIG)
    with pytest.raises(ConfigError, match="quantise the model first, then wrap it"):
        qwix.quantize_model(model, provider("int8"), X)


UP, ALL = {"module_path": "up"}, {"module_path": ".*"}
BY_PATH = {
    "no activation": [{"module_path": "up|down|heads"}],
    "those of one": [{**UP, "act_qtype": "int8"}, ALL],
    "those of others": [UP, {**ALL, "act_qtype": "int8"}],
}


@FRONT_ENDS
@pytest.mark.parametrize("rules", BY_PATH.values(), ids=BY_PATH)
def test_rules_by_path_reach_adapted_layers(front_end, rules):
    """A fresh adapter changes nothing; a trained one what the base model's rules leave as it is."""
    rules = [qwix.QuantizationRule(weight_qtype="int8", **rule) for rule in rules]
    if front_end == "nnx":
        base = qwix.quantize_model(Net(), qwix.PtqProvider(rules), X)
    else:
        module = qwix.quantize_model(LinenNet(), qwix.PtqProvider(rules))
        base = module.bind(module.init(jax.random.key(0), X))
    run, state = called(base) if front_end == "nnx" else (module.apply, base.variables)
    plain, compiled = base(X), jax.jit(run)(state, X)
    model = get_peft_model(base, CONFIG, **samples(front_end))
    np.testing.assert_array_equal(model(X), plain)
    run, state = called(model)
    np.testing.assert_array_equal(jax.jit(run)(state, X), compiled)


def test_rows_of_a_linen_model_with_rules_by_path():
    """Also inside a module of which the adapter trains a bias."""

    class Part(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = self.param("bias", nn.initializers.ones, (128,))
            return nn.Dense(128, use_bias=False, name="up")(x) + bias

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Part(name="part")(x)

    rules = [qwix.QuantizationRule(module_path="part/up", weight_qtype="int8")]
    module = qwix.quantize_model(Outer(), qwix.PtqProvider(rules))
    base = module.bind(module.init(jax.random.key(0), X))
    config = RandLoraConfig(r=8, target_modules=["up"], bias="all", init_weights=False)
    model = get_peft_model(base, config, rngs=jax.random.key(1), sample_inputs=(X,))
    expected = model(X)
    with model.disable_adapter():
        plain = model(X)
    found = model(X, adapter_names=["default", "__base__"] * 2 + ["default"])
    np.testing.assert_allclose(found[::2], expected[::2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1::2], plain[1::2], rtol=1e-4, atol=1e-4)
