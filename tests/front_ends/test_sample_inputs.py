"""A linen model that is run without numbers tells what its layers are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from linen_nets import CONFIG, RNGS, TOKENS, X, assert_runs_as_merged, wrapped

from randlora_jax import (
    ConfigError,
    KernelLayout,
    LayerType,
    RandLoraConfig,
    RandLoraModel,
    SampleInputs,
    TargetError,
    get_peft_model,
)

INIT = nn.initializers.lecun_normal()
IDS = jnp.arange(10).reshape(2, 5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(Block)(name="block")(x)[0]


class Mixed(nn.Module):
    """Layers of every kind, and others that are no linear layers."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8, name="table")(ids)
        x = nn.Conv(8, (3,), name="conv")(x)
        x = nn.Einsum((8, 2, 4), name="mix")(x, "btd,dhk->bthk").reshape(x.shape)
        axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "length": 2}
        x, _ = nn.scan(nn.remat(Block), **axes)(name="layers")(x, None)
        return Block(name="last")(x)[0]


BLOCK = ["attn.key", "attn.out", "attn.query", "attn.value", "down", "up"]


def names(model):
    return sorted(model.targeted_module_names)


def test_all_linear_takes_every_layer_with_nothing_stated():
    model = wrapped(Mixed(), IDS, sample_inputs=(IDS,))
    stacked = {"attn.0.key", "attn.1.out", "0.down", "1.up"}
    assert {f"layers.{name}" for name in stacked} < set(names(model))
    assert len(names(model)) == 1 + 3 * len(BLOCK)
    left = {a.path: a.why for a in model.coverage() if a.taken == "left out"}
    left = {path: why for path, why in left.items() if not path.endswith(("bias", "scale"))}
    assert left == {"table/embedding": "it is an embedding", "conv/kernel": "it is a convolution"}
    assert_runs_as_merged(model, IDS)


def test_what_nn_jit_has_compiled_is_met_all_the_same():
    net = Jitted()
    variables = net.init(RNGS, TOKENS)
    for _ in range(2):
        net.apply(variables, TOKENS)
    model = get_peft_model(
        net.bind(variables), CONFIG, rngs=RNGS["params"], sample_inputs=(TOKENS,)
    )
    assert names(model) == [f"block.{name}" for name in BLOCK]


class Modes(nn.Module):
    """Takes keywords, draws, and keeps statistics."""

    @nn.compact
    def __call__(self, x, *, mode="a", train=False):
        assert mode in ("a", "b")
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.DenseGeneral((2, 3), name="heads")(x)


def test_keywords_shapes_and_other_methods():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    sample = {"x": shape, "mode": "b", "train": True}
    model = wrapped(Modes(), X, sample_inputs=sample)
    assert names(model) == ["heads"]
    assert_runs_as_merged(model, X)


class Parts(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.DenseGeneral((2, 4)), nn.DenseGeneral((3, 2))

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        return self.decoder(x)

    def both(self, x):
        return self.decoder(self.encode(x).reshape(x.shape))


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (None, ["decoder"]),
        ("encode", ["encoder"]),
        (Parts.both, ["decoder", "encoder"]),
    ],
)
@pytest.mark.filterwarnings("ignore:the adapter leaves out")
def test_a_method_tells_what_it_reaches(method, found):
    model = wrapped(Parts(), X, init="both", sample_inputs=SampleInputs((X,), method=method))
    assert names(model) == found


def test_a_file_is_opened_with_them(tmp_path):
    model = wrapped(Block(), TOKENS, sample_inputs=(TOKENS,))
    model.save_pretrained(tmp_path)
    bound = Block().bind(Block().init(RNGS, TOKENS))
    again = RandLoraModel.from_pretrained(bound, tmp_path, sample_inputs=(TOKENS,))
    found, _ = again.apply(again.variables, TOKENS)
    expected, _ = model.apply(model.variables, TOKENS)
    assert jnp.array_equal(found, expected)


class Tree(nn.Module):
    """One param that is a tree of kernels."""

    called: str = "experts"

    @nn.compact
    def __call__(self, x):
        def made(key):
            up, down = INIT(key, (8, 6)), [INIT(key, (6, 8)), INIT(key, (6, 8))]
            return {"up": up, "down": down}

        held = self.param(self.called, made)
        hidden = x @ held["up"]
        return nn.Dense(2, name="head")(
            hidden @ held["down"][0] + nn.tanh(hidden @ held["down"][1])
        )


class HoldsTree(nn.Module):
    called: str

    @nn.compact
    def __call__(self, x):
        return Tree(self.called, name="tree")(x)


@pytest.mark.parametrize("called", ["experts", "kernel"])
def test_several_arrays_of_one_param(called):
    rules = {"views": {f"tree/{called}/(up|down.*)": "i o"}}
    model = wrapped(HoldsTree(called), X, sample_inputs=(X,), **rules)
    arrays = [f"tree.{called}.{array}" for array in ("down.0", "down.1", "up")]
    assert sorted(names(model)) == sorted([*arrays, "tree.head"])
    assert_runs_as_merged(model, X)
    untraced = wrapped(HoldsTree(called), X, **rules)
    with pytest.raises(ConfigError, match=r"one of several arrays.*pass sample_inputs"):
        untraced.apply(untraced.variables, X)


class Normed(nn.Module):
    """Layers whose kernel is another one when it multiplies."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="plain")(x)
        x = nn.WeightNorm(nn.Dense(8, name="weight"), use_scale=False)(x)
        doubled = nn.map_variables(
            nn.Dense,
            "params",
            trans_in_fn=lambda tree: jax.tree.map(lambda x: 2 * x, tree),
            init=self.is_initializing(),
        )
        return nn.SpectralNorm(doubled(8, name="spectral"))(x, update_stats=False)


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(8, name="spectral"))(x, update_stats=False)
        return nn.WeightNorm(nn.Dense(8, name="weight"))(x)


@pytest.mark.parametrize(
    ("target", "sample", "reason"),
    [
        ("weight", (X,), "a WeightNorm multiplies by another kernel"),
        ("spectral", (X,), "a SpectralNorm multiplies by another kernel"),
        ("weight", None, "a WeightNorm multiplies by another kernel"),
        ("spectral", None, "a SpectralNorm multiplies by another kernel"),
    ],
)
def test_normed_layers_are_refused_by_name(target, sample, reason):
    config = RandLoraConfig(r=4, target_modules=[target])
    with pytest.raises(TargetError, match=f"'{target}' cannot take an adapter: {reason}"):
        wrapped(Scaled(), X, config=config, sample_inputs=sample)


def test_normed_layers_that_leave_no_trace_are_refused_when_they_run():
    for target in ("weight", "spectral"):
        config = RandLoraConfig(r=4, target_modules=[target])
        with pytest.raises(TargetError, match=f"'{target}' cannot take an adapter"):
            wrapped(Normed(), X, config=config, sample_inputs=(X,))
    config = RandLoraConfig(r=4, target_modules=["weight"])
    model = wrapped(Normed(), X, config=config)
    with pytest.raises(
        ConfigError, match=r"'weight': a WeightNorm.*called and merged would differ"
    ):
        model.apply(model.variables, X)
    config = RandLoraConfig(r=4, target_modules=["plain"], init_weights=False)
    assert_runs_as_merged(wrapped(Normed(), X, config=config, sample_inputs=(X,)), X)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ConfigError, match=r"sample_inputs.*expected a tuple"):
        wrapped(Parts(), X, init="both", sample_inputs=X)
    with pytest.raises(ConfigError, match="sample_inputs: Parts cannot be called with them"):
        wrapped(Parts(), X, init="both", sample_inputs=(X, X))
    types = {Block: LayerType(KernelLayout("i o"))}
    with pytest.raises(ConfigError, match="layer_types: no module of this model is a Block"):
        wrapped(Parts(), X, init="both", sample_inputs=(X,), layer_types=types)
    layer = nnx.Dict(dense=nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    for model, rules in ((layer, {}), ({"d": {"kernel": X}}, {"views": {"d": "i o"}})):
        with pytest.raises(
            ConfigError, match=r"sample_inputs: a .* tells its layers without a call"
        ):
            get_peft_model(model, CONFIG, rngs=RNGS["params"], sample_inputs=(X,), **rules)
