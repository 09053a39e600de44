"""Other people's models, rebuilt small: their paths, shapes, einsums, scans and boxes.

The code bases themselves are run by ``benchmarks/code_bases.py``; these keep what it found right.
"""

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model

CONFIG = RandLoraConfig(r=2, randlora_alpha=4, target_modules="all-linear")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 5)))
X = jax.random.normal(jax.random.key(1), (2, 5, 8))


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Nothing here runs long enough to be worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def known_as(name: str):
    """Gives a class the full name of one that is known."""

    def rename(kind):
        kind.__module__, _, kind.__qualname__ = name.rpartition(".")
        return kind

    return rename


def drawn(rngs, *shape):
    return nnx.Param(rngs.normal(shape))


def random(x):
    """Zeros become noise, other numbers are scaled."""
    noise = 0.2 * jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), x.dtype)
    return jnp.where(x == 0, noise, x * (1 + noise))


def gradients(model, inputs):
    """Lambda's and gamma's of every layer, of an adapter of random numbers; the output with it."""
    if isinstance(model, nnx.Module):
        trained = jax.tree.map(random, nnx.state(model, AdapterParam))
        graph, _, frozen = nnx.split(model, AdapterParam, ...)

        def loss(t, frozen):
            return (nnx.merge(graph, t, frozen)(*inputs) ** 2).mean()

        nnx.update(model, jax.jit(jax.grad(loss))(trained, frozen))
        found = model._store.state("default").layers
        nnx.update(model, trained)
        return found, model(*inputs)
    trained, frozen = model.split()
    trained = jax.tree.map(random, trained)

    def loss(trained):
        return (model.apply({**frozen, "randlora": trained}, *inputs) ** 2).mean()

    model.variables = {**frozen, "randlora": jax.jit(jax.grad(loss))(trained)}
    found = model._store.state("default").layers
    model.variables = {**frozen, "randlora": trained}
    return found, model(*inputs)


def check(make, inputs, names, folder, **said):
    """A model is adapted in the layers of `names`, exactly, and read back; PEFT sees these names.

    Args:
      make: the model alone, always the same.
      names: of all adapted matrices.
    """
    alone = make()(*inputs)
    model = get_peft_model(make(), CONFIG, **said)
    assert sorted(model.targeted_module_names) == sorted(names)
    np.testing.assert_array_equal(model(*inputs), alone)
    found, out = gradients(model, inputs)
    assert float(jnp.abs(out - alone).max()) > 1e-3
    for layer, (lam, gamma) in found.items():
        assert jnp.abs(lam).max(axis=(-2, -1)).all(), layer
        assert jnp.abs(gamma).max(axis=(-2, -1)).all(), layer
    model.save_pretrained(folder)
    again = RandLoraModel.from_pretrained(make(), folder, **said)
    np.testing.assert_array_equal(again(*inputs), out)
    model.merge_adapter()
    np.testing.assert_allclose(model(*inputs), out, rtol=1e-5, atol=1e-5 * float(abs(out).max()))
    return model


def bound(module, *inputs):
    return module.bind(module.init(jax.random.key(0), *inputs))


# jax-ml/bonsai: flax's own layers, in a module of the twin's structure.


class BonsaiAttention(nnx.Module):
    def __init__(self, rngs):
        for name in "qkvo":
            setattr(self, f"{name}_proj", nnx.Linear(8, 8, use_bias=False, rngs=rngs))
        self.q_norm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        q, k, v = self.q_norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        return self.o_proj(jax.nn.softmax(q @ k.mT) @ v)


class BonsaiLayer(nnx.Module):
    def __init__(self, rngs):
        self.attn = BonsaiAttention(rngs)
        self.input_layernorm = nnx.RMSNorm(8, rngs=rngs)

    def __call__(self, x):
        return x + self.attn(self.input_layernorm(x))


@known_as("bonsai.models.qwen3.modeling.Qwen3")
class BonsaiQwen3(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embedder = nnx.Embed(9, 8, rngs=rngs)
        self.layers = nnx.List([BonsaiLayer(rngs) for _ in range(2)])
        self.lm_head = nnx.Linear(8, 9, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embedder(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_bonsai(tmp_path):
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"]
    model = check(BonsaiQwen3, (IDS,), names, tmp_path)
    left = {array.path: array.taken for array in model.coverage()}
    assert left["lm_head/kernel"] == left["embedder/embedding"] == "left out"


# DeepMind's gemma: the equation first, two kernels of a feed-forward, all of it under nn.jit.


class GemmaEinsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(
            equation, x, self.param(self.weight_name, nn.initializers.normal(0.5), self.shape)
        )


class GemmaAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = GemmaEinsum((4, 8, 2), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = GemmaEinsum((2, 2, 8, 2), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSNH->BNTS", q, k))
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        return GemmaEinsum((4, 2, 8), name="attn_vec_einsum")("BTNH,NHD->BTD", mixed)


class GemmaFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = GemmaEinsum((2, 12, 8), weight_name="gating_einsum")
        nn.share_scope(self, gating)
        gate = gating("...F,NHF->...NH", x)
        linear = GemmaEinsum((12, 8), weight_name="linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class GemmaBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + GemmaAttention(name="attn")(x)
        return x + GemmaFeedForward(name="mlp")(x)


class GemmaConfig:
    use_qk_norm = use_post_attn_norm = transpose_gating_einsum = True


@known_as("gemma.gm.nn._transformer.Transformer")
class Gemma(nn.Module):
    config: Any = GemmaConfig

    @nn.jit
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(9, 8, name="embedder")(ids)
        for i in range(2):
            x = GemmaBlock(name=f"layer_{i}")(x)
        return x


def test_deepmind_gemma(tmp_path):
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    check(lambda: bound(Gemma(), IDS), (IDS,), names, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["base_model_class"] == "Gemma3ForCausalLM"


# MaxText: nnx layers scanned along axis 1 of their kernels, all else along axis 0.


class MaxTextDense(nnx.Module):
    def __init__(self, rngs, n_in, n_out):
        self.axis = tuple(range(-len(n_in), 0))
        self.kernel = drawn(rngs, *n_in, *n_out)

    def __call__(self, x):
        inner = tuple(range(len(self.axis)))
        return jax.lax.dot_general(
            x, self.kernel[...], ((tuple(x.ndim + a for a in self.axis), inner), ((), ()))
        )


class MaxTextAttention(nnx.Module):
    def __init__(self, rngs):
        for name in ("query", "key", "value"):
            setattr(self, name, MaxTextDense(rngs, (8,), (2, 4)))
        self.out = MaxTextDense(rngs, (2, 4), (8,))

    def __call__(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return self.out(jnp.einsum("bhts,bshd->bthd", weights, v))


class MaxTextMlp(nnx.Module):
    def __init__(self, rngs):
        self.wi_0, self.wi_1 = MaxTextDense(rngs, (8,), (12,)), MaxTextDense(rngs, (8,), (12,))
        self.wo = MaxTextDense(rngs, (12,), (8,))

    def __call__(self, x):
        return self.wo(nnx.silu(self.wi_0(x)) * self.wi_1(x))


class MaxTextMixture(nnx.Module):
    def __init__(self, rngs):
        self.gate = MaxTextDense(rngs, (8,), (3,))
        self.wi_0, self.wi_1 = drawn(rngs, 3, 8, 12), drawn(rngs, 3, 8, 12)
        self.wo = drawn(rngs, 3, 12, 8)

    def __call__(self, x):
        def each(equation, x, kernel):
            return jnp.einsum(equation, x, kernel[...])

        hidden = nnx.silu(each("btd,edf->btef", x, self.wi_0)) * each("btd,edf->btef", x, self.wi_1)
        out = each("btef,efd->bted", hidden, self.wo)
        return jnp.einsum("bte,bted->btd", jax.nn.softmax(self.gate(x)), out)


class MaxTextLayer(nnx.Module):
    def __init__(self, config, rngs):
        self.self_attention = MaxTextAttention(rngs)
        if config.mixture:
            self.moe_block = MaxTextMixture(rngs)
        else:
            self.mlp = MaxTextMlp(rngs)
        self.step = nnx.Variable(jnp.ones(()))  # what is no parameter is scanned along axis 0

    def __call__(self, x):
        x = x + 0.1 * self.self_attention(x)
        return x + 0.1 * self.step * (self.moe_block if hasattr(self, "moe_block") else self.mlp)(x)


class MaxTextDecoder(nnx.Module):
    def __init__(self, config, rngs):
        axes = nnx.StateAxes({nnx.Param: config.param_scan_axis, ...: 0})
        make = nnx.vmap(lambda rngs: MaxTextLayer(config, rngs), in_axes=0, out_axes=axes)
        self.layers = make(rngs.split(2))
        self.logits_dense = MaxTextDense(rngs, (8,), (9,))

    def __call__(self, x):
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)
        params = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params)

        def layer(x, state):
            return nnx.merge(graph, *state)(x), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (params, rest))
        return self.logits_dense(x)


class MaxTextConfig:
    scan_layers, param_scan_axis = True, 1

    def __init__(self, decoder_block, mixture=False):
        self.decoder_block, self.mixture = decoder_block, mixture


@known_as("maxtext.models.models.Transformer")
class MaxText(nnx.Module):
    def __init__(self, config, rngs):
        self.config = config
        self.token_embedder = nnx.Embed(9, 8, rngs=rngs)
        self.decoder = MaxTextDecoder(config, rngs)

    def __call__(self, ids):
        return self.decoder(self.token_embedder(ids))


@known_as("maxtext.models.models.TransformerLinen")
class MaxTextInLinen(nn.Module):
    """As MaxText's own copy of flax's bridge, which ignores params that it does not know."""

    nnx_class: Any
    args: Any
    kwargs: Any
    skip_rng: bool = False

    @nn.compact
    def __call__(self, *args):
        model = self.nnx_class(*self.args, **self.kwargs, rngs=nnx.Rngs(0))
        if self.is_initializing():
            for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
                box = nn.LogicallyPartitioned(leaf.get_raw_value(), (None,) * leaf.ndim)
                self.scope.root.put_variable("params", path[0], self._with(path, box))
            return model(*args)
        params = self.variables["params"]
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            held = params
            for part in path:
                held = held[part]
            leaf.set_raw_value(held.unbox() if hasattr(held, "unbox") else held)
        return model(*args)

    def _with(self, path, box):
        tree = dict(self.scope.root.get_variable("params", path[0]) or {})
        node = tree
        for part in path[1:-1]:
            node[part] = dict(node.get(part, {}))
            node = node[part]
        node[path[-1]] = box
        return tree


DENSE_NAMES = [
    f"decoder.layers.mlp.{i}.{part}" for i in range(2) for part in ("wi_0", "wi_1", "wo")
]
ATTENTION_NAMES = [
    f"decoder.layers.self_attention.{i}.{part}"
    for i in range(2)
    for part in ("query", "key", "value", "out")
]
QWEN_ATTENTION = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"]
QWEN_EXPERTS = [
    f"model.layers.{i}.mlp.experts.{e}.{part}_proj"
    for i in range(2)
    for e in range(3)
    for part in ("gate", "up", "down")
]
MAXTEXT = {
    "dense": (
        MaxTextConfig("llama2"),
        [*DENSE_NAMES, *ATTENTION_NAMES, "decoder.logits_dense"],
    ),
    "experts": (
        MaxTextConfig("qwen3_moe", mixture=True),
        [*QWEN_ATTENTION, *QWEN_EXPERTS, "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    ),
}


@pytest.mark.parametrize("kind", MAXTEXT)
@pytest.mark.parametrize("framework", ["nnx", "nnx in linen"])
def test_maxtext(kind, framework, tmp_path):
    config, names = MAXTEXT[kind]
    if framework == "nnx":
        check(lambda: MaxText(config, nnx.Rngs(0)), (IDS,), names, tmp_path)
    else:
        module = MaxTextInLinen(MaxText, (), {"config": config})
        check(lambda: bound(module, IDS), (IDS,), names, tmp_path)


# EasyDeL: linear layers of its own, experts sorted by tokens.


@known_as("easydel.layers.linears._linear.ParallelLinear")
class ParallelLinear(nnx.Module):
    def __init__(self, n_in, n_out, rngs):
        self.kernel, self.scale = drawn(rngs, n_in, n_out), 0.5

    def __call__(self, x):
        return self.scale * (x @ self.kernel[...])


@known_as("easydel.layers.linears._linear_moe.ParallelMoELinear")
class ParallelMoELinear(nnx.Module):
    def __init__(self, n_in, n_out, rngs, out_first=False):
        self.out_first = out_first
        self.kernel = drawn(rngs, 3, n_out, n_in) if out_first else drawn(rngs, 3, n_in, n_out)

    def __call__(self, x, group_sizes):
        kernel = self.kernel[...].mT if self.out_first else self.kernel[...]
        return jax.lax.ragged_dot(x, kernel, group_sizes)


@known_as("easydel.infra.base_module.EasyDeLBaseModule")
class EasyDeLBaseModule(nnx.Module):
    pass


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = ParallelMoELinear(8, 12, rngs)
        self.down_proj = ParallelMoELinear(12, 8, rngs, out_first=True)


class EasyDeLMixture(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.experts = ParallelLinear(8, 3, rngs), Experts(rngs)

    def __call__(self, x):
        rows = x.reshape(-1, 8)
        chosen = jnp.arange(len(rows)) % 3
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=3)
        hidden = nnx.silu(self.experts.gate_proj(rows[order], sizes))
        out = self.experts.down_proj(hidden, sizes)[jnp.argsort(order)]
        return (out * jax.nn.sigmoid(self.gate(rows)).sum(-1, keepdims=True)).reshape(x.shape)


class EasyDeLLayer(nnx.Module):
    def __init__(self, rngs):
        self.mlp = EasyDeLMixture(rngs)


class EasyDeLModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([EasyDeLLayer(rngs) for _ in range(2)])


class Qwen3MoeForCausalLM(EasyDeLBaseModule):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.config = MaxTextConfig("qwen3_moe")
        self.config.model_type = "qwen3_moe"
        self.model = EasyDeLModel(rngs)

    def __call__(self, x):
        for layer in self.model.layers:
            x = x + layer.mlp(x)
        return x


def test_easydel(tmp_path):
    names = [f"model.layers.{i}.mlp.gate" for i in range(2)] + [
        f"model.layers.{i}.mlp.experts.{e}.{part}_proj"
        for i in range(2)
        for e in range(3)
        for part in ("gate", "down")
    ]
    check(Qwen3MoeForCausalLM, (X,), names, tmp_path)


# openpi: linen modules in an nnx model, scanned, digits in their einsums.


class PiEinsum(nn.Module):
    shape: tuple[int, ...]

    def setup(self):
        self.w = self.param("w", nn.initializers.normal(0.5), self.shape)

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w)


class PiAttention(nn.Module):
    @nn.compact
    def __call__(self, xs):
        found = []
        for i, x in enumerate(xs):
            end = f"_{i}" if i else ""
            q = PiEinsum((2, 8, 4), name=f"q_einsum{end}")("BTD,NDH->BTNH", x)
            k, v = PiEinsum((2, 1, 8, 4), name=f"kv_einsum{end}")("BSD,2KDH->2BSKH", x)
            found.append((q, k, v))
        q, k, v = (jnp.concatenate(parts, 1) for parts in zip(*found, strict=True))
        weights = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BNTS", q, k))
        mixed, out, start = jnp.einsum("BNTS,BSKH->BTNH", weights, v), [], 0
        for i, x in enumerate(xs):
            end, part = f"_{i}" if i else "", mixed[:, start : start + x.shape[1]]
            out.append(PiEinsum((2, 4, 8), name=f"attn_vec_einsum{end}")("BTNH,NHD->BTD", part))
            start += x.shape[1]
        return out


class PiFeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        gating = self.param("gating_einsum", nn.initializers.normal(0.5), (2, 8, 12))
        linear = self.param("linear", nn.initializers.normal(0.5), (12, 8))
        return jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


class PiBlock(nn.Module):
    @nn.compact
    def __call__(self, xs, _):
        xs = [x + y for x, y in zip(xs, PiAttention(name="attn")(xs), strict=True)]
        names = ["mlp", "mlp_1"]
        return [x + PiFeedForward(name=n)(x) for x, n in zip(xs, names, strict=True)], None


class PiLanguage(nn.Module):
    @nn.compact
    def __call__(self, xs):
        block = nn.scan(
            nn.remat(PiBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return block(name="layers")(xs, None)[0]


@known_as("openpi.models.pi0.Pi0")
class Pi0(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        llm = nnx.bridge.ToNNX(PiLanguage())
        llm.lazy_init([X, X], rngs=rngs)
        self.PaliGemma = nnx.Dict(llm=llm)
        self.state_proj = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return sum(self.PaliGemma.llm([x, jnp.sin(self.state_proj(x))]))


def test_openpi(tmp_path):
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [
        f"mlp.{part}_proj" for part in ("gate", "up", "down")
    ]
    decoders = [
        "paligemma_with_expert.paligemma.model.language_model",
        "paligemma_with_expert.gemma_expert.model",
    ]
    names = [f"{d}.layers.{i}.{part}" for d in decoders for i in range(2) for part in parts]
    check(Pi0, (X,), [*names, "state_proj"], tmp_path)


# vision_transformer and big_vision, lm1b and octo: linen modules that tell their types when run.


class VitBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))), None


class Vit(nn.Module):
    """With its blocks scanned or not, and a head that attends with a probe of its own."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            scan = nn.scan(
                VitBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = scan(name="encoderblock")(x, None)
        else:
            for i in range(2):
                x, _ = VitBlock(name=f"encoderblock_{i}")(x)
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, 8))
        return nn.MultiHeadDotProductAttention(num_heads=2)(jnp.tile(probe, (2, 1, 1)), x)


HEAD = "MultiHeadDotProductAttention_0"
VIT_LAYERS = [
    *(f"{HEAD}.{part}" for part in ("query", "key", "value", "out")),
    "Dense_0",
    "Dense_1",
]


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.filterwarnings("ignore:.*names")
def test_vision_transformer(scanned, tmp_path):
    block = (lambda i, layer: f"encoderblock_{i}.{layer}") if not scanned else _scanned_name
    names = [block(i, layer) for i in range(2) for layer in VIT_LAYERS]
    names += [f"{HEAD}.{part}" for part in ("query", "key", "value", "out")]
    check(lambda: bound(Vit(scanned), X), (X,), names, tmp_path, sample_inputs=(X,))


def _scanned_name(i, layer):
    """The index of a stack stands before the last part."""
    *outer, last = f"encoderblock.{layer}".split(".")
    return ".".join([*outer, str(i), last])


class Lm1b(nn.Module):
    """Boxes that name fewer axes than their arrays have."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("embed", "kv"))
        y = nn.MultiHeadDotProductAttention(num_heads=2, kernel_init=init)(x, x)
        return nn.Dense(9, kernel_init=init)(y)


def test_lm1b(tmp_path):
    names = [*(f"{HEAD}.{part}" for part in ("query", "key", "value", "out")), "Dense_0"]

    def make():
        return bound(Lm1b(), X)

    model = check(make, (X,), names, tmp_path, sample_inputs=(X,))
    held = model.variables["params"]["Dense_0"]["kernel"]
    assert held.names == ("embed", "kv")


class Octo(nn.Module):
    """Parts in dicts, made in setup, called one by one."""

    def setup(self):
        self.tokenizers = {"primary": nn.Dense(8), "wrist": nn.DenseGeneral((2, 4))}
        self.transformer = Vit(scanned=False)
        self.heads = {"action": nn.Dense(3)}

    def __call__(self, x):
        return self.heads["action"](self.embed(x))

    def embed(self, x):
        eyes = self.tokenizers["primary"](x) + self.tokenizers["wrist"](x).reshape(x.shape)
        return self.transformer(eyes)


def test_octo(tmp_path):
    vit = [f"transformer.encoderblock_{i}.{layer}" for i in range(2) for layer in VIT_LAYERS]
    vit += [f"transformer.{HEAD}.{part}" for part in ("query", "key", "value", "out")]
    names = [*vit, "tokenizers_primary", "tokenizers_wrist", "heads_action"]
    model = check(lambda: bound(Octo(), X), (X,), names, tmp_path, sample_inputs=(X,))
    model.unmerge_adapter()
    part = model.apply(model.variables, X, method="embed")
    assert float(jnp.abs(part - bound(Octo(), X).embed(X)).max()) > 1e-3
