"""MaxText: nnx layers scanned along axis 1 of their kernels, all else along axis 0."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rebuilt import IDS, bound, check, drawn, known_as

from randlora_jax import ConfigError, RandLoraConfig, get_peft_model


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
        make = nnx.vmap(lambda key: MaxTextLayer(config, nnx.Rngs(key)), in_axes=0, out_axes=axes)
        self.layers = make(jax.random.split(rngs.params(), 2))
        self.logits_dense = MaxTextDense(rngs, (8,), (9,))

    def __call__(self, x):
        graph, params, rest = nnx.split(self.layers, nnx.Param, ...)
        params = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params)

        def layer(x, state):
            return nnx.merge(graph, *state)(x), None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (params, rest))
        return self.logits_dense(x)


class MaxTextConfig:
    scan_layers, param_scan_axis, logits_via_embedding = True, 1, False

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


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_head_of_its_own_is_trained_whole(saved):
    """Unless the embedding makes the logits, it shares no weight."""
    settings = RandLoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    model = get_peft_model(MaxText(MaxTextConfig("qwen3"), nnx.Rngs(0)), settings)
    (whole,) = [array for array in model.coverage() if array.taken == "trained whole"]
    assert whole.shape == ((8, 9) if saved == "lm_head" else (9, 8))
    tied = MaxTextConfig("qwen3")
    tied.logits_via_embedding = True
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens', 'lm_head' share one weight"):
        get_peft_model(MaxText(tied, nnx.Rngs(0)), settings)
