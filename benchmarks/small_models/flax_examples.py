"""The examples in flax's own repository."""

import importlib
import sys

import jax
import jax.numpy as jnp
from flax import nnx

from small_models.entry import CodeBase, Entry, bound, ids, normal

SIZES = {
    "vocab_size": 61,
    "emb_dim": 24,
    "num_heads": 2,
    "num_layers": 2,
    "qkv_dim": 24,
    "mlp_dim": 40,
    "max_len": 16,
}


def _models(example, name="models"):
    """A module of one example, each of which is a folder of its own."""
    folder = next(p for p in sys.path if p.endswith("flax/examples"))
    sys.path.insert(0, f"{folder}/{example}")
    return importlib.import_module(name)


def wmt():
    m = _models("wmt")
    config = m.TransformerConfig(**SIZES, output_vocab_size=61, deterministic=True)
    module, x = m.Transformer(config), ids()

    def call(model, x):
        return model(x, x)

    return Entry(bound(module, x, x), {"x": x}, call, said="sample_inputs=(x, x)")


def lm1b():
    m = _models("lm1b")
    config = m.TransformerConfig(**SIZES, output_vocab_size=61, deterministic=True)
    x = ids()
    return Entry(bound(m.TransformerLM(config), x), {"x": x}, said="sample_inputs=(x,)")


def nlp_seq():
    m = _models("nlp_seq")
    module, x = m.Transformer(m.TransformerConfig(**SIZES, output_vocab_size=7)), ids()
    return Entry(
        bound(module, inputs=x, train=False),
        {"x": x},
        lambda model, x: model(inputs=x, train=False),
        said="sample_inputs=dict(inputs=x, train=False)",
    )


def sst2():
    m = _models("sst2")
    module = m.TextClassifier(
        embedding_size=24,
        hidden_size=24,
        vocab_size=61,
        output_size=1,
        dropout_rate=0.0,
        word_dropout_rate=0.0,
        unk_idx=1,
        deterministic=True,
    )
    inputs = {"x": ids(), "lengths": jnp.asarray([8, 5, 7])}
    return Entry(bound(module, *inputs.values()), inputs)


def vae():
    module, x = _models("vae").model(8), jax.nn.sigmoid(normal(3, 784))

    def call(model, x):
        return model(x, jax.random.key(1))[0]

    return Entry(bound(module, x, jax.random.key(1)), {"x": x}, call)


def gemma():
    m, settings = _models("gemma", "transformer"), _models("gemma", "transformer_cfg")
    kinds = settings.AttentionType
    config = settings.TransformerConfig(
        num_layers=2,
        num_embed=61,
        embed_dim=36,
        hidden_dim=52,
        num_heads=4,
        head_dim=12,
        num_kv_heads=2,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        attn_logits_soft_cap=50.0,
        sliding_window_size=64,
    )
    x = ids()
    positions = jnp.broadcast_to(jnp.arange(8), x.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (3, 8, 8))
    return Entry(
        m.Transformer(config, rngs=nnx.Rngs(0)),
        {"x": x, "positions": positions, "mask": mask},
        lambda model, x, positions, mask: model(x, positions, None, mask)[0],
    )


BASE = CodeBase(
    "flax examples",
    "18f8f31",
    "linen, nnx",
    ("flax/examples",),
    {"wmt": wmt, "lm1b": lm1b, "nlp_seq": nlp_seq, "sst2": sst2, "vae": vae, "gemma": gemma},
)
