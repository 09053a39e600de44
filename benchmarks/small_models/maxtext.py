"""MaxText: its transformer as an nnx module, as that in linen, and in linen throughout."""

import sys

import jax.numpy as jnp
from flax import nnx

from small_models.entry import CodeBase, Entry, bound, ids

SETTINGS = {
    "per_device_batch_size": 2.0,
    "run_name": "t",
    "enable_checkpointing": False,
    "base_num_decoder_layers": 2,
    "attention": "dot_product",
    "max_target_length": 8,
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 48,
    "head_dim": 8,
    "vocab_size": 64,
    "base_moe_mlp_dim": 48,
    "max_prefill_predict_length": 4,
    "dtype": "float32",
    "weight_dtype": "float32",
    "override_model_config": True,
    "skip_jax_distributed_system": True,
}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sparse_matmul": False,
    "megablox": False,
}
MIXTRAL = {"decoder_block": "mixtral", **MIXTURE}
QWEN = {"decoder_block": "qwen3", "use_qk_norm": True}
QWEN_MOE = {"decoder_block": "qwen3_moe", "use_qk_norm": True, **MIXTURE}
PURE = {"enable_nnx": False, "pure_nnx_decoder": False, "pure_nnx": False}


def entry(*, as_nnx, **changes):
    from jax.sharding import Mesh
    from maxtext.common.common_types import DECODING_ACTIVE_SEQUENCE_INDICATOR, MODEL_MODE_TRAIN
    from maxtext.configs import pyconfig
    from maxtext.models import models
    from maxtext.utils import maxtext_utils

    base = f"{next(p for p in sys.path if p.endswith('maxtext/src'))}/maxtext/configs/base.yml"
    config = pyconfig.initialize([sys.argv[0], base], **{**SETTINGS, **changes})
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    given = {"config": config, "mesh": mesh, "quant": None, "model_mode": MODEL_MODE_TRAIN}
    tokens = ids(2)
    inputs = {
        "tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(8), tokens.shape),
        "segments": jnp.zeros(tokens.shape) + DECODING_ACTIVE_SEQUENCE_INDICATOR,
    }
    if as_nnx:
        model = models.Transformer(**given, rngs=nnx.Rngs(params=0, dropout=1))
    else:
        module = models.transformer_as_linen(**given)
        model = bound(module, *inputs.values(), enable_dropout=False)

    def call(model, *inputs):
        return model(*inputs, enable_dropout=False, model_mode=MODEL_MODE_TRAIN)

    return Entry(model, inputs, call)


KINDS = {
    "nnx": {"as_nnx": True},
    "nnx in linen": {"as_nnx": False},
    "linen": {"as_nnx": False, **PURE},
}
DECODERS = {
    "dense": {},
    "Mixtral": MIXTRAL,
    "Qwen 3": QWEN,
    "Qwen 3, experts, not scanned": {**QWEN_MOE, "scan_layers": False},
}
BASE = CodeBase(
    "MaxText",
    "e591f30",
    "nnx, linen",
    ("maxtext/src",),
    {
        f"{decoder}, {kind}": lambda a=a, b=b: entry(**a, **b)
        for kind, a in KINDS.items()
        for decoder, b in DECODERS.items()
    },
)
