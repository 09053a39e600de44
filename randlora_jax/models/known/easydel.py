"""EasyDeL (flax.nnx): every model, since all carry the names of their twins in transformers.

Its linear layers may scale what they compute, so adapters join in the kernel. Quantised ones do
not, and each number of their ``quant_kernel`` is several of a row: adapters run beside. A mixture
of experts holds (expert, in, out) or (expert, out, in).
"""

from typing import Any

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.models.known.entry import Entries, KnownModel, twin
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table


def _experts(module: Any) -> LayerType:
    return LayerType(KernelLayout("s o i" if module.out_first else "s i o"), None)


def _quantised(module: Any) -> LayerType:
    matrix = module.in_features, module.out_features
    return LayerType(KernelLayout("i o"), leaf="quant_kernel", shape=matrix)


_TYPES: Table = {
    "easydel.layers.linears._linear_quantized.ParallelLinearQuantized": _quantised,
    "easydel.layers.linears._linear.ParallelLinear": LayerType(KernelLayout("i o"), None),
    "easydel.layers.linears._linear_moe.ParallelMoELinear": _experts,
}
_NAMES = {
    r"model/layers/(\d+)/mlp/experts/(\w+)": r"model.layers.\1.mlp.experts.{}.\2",
    r"model/layers/(\d+)/block_sparse_moe/experts/(\w+)": (
        r"model.layers.\1.block_sparse_moe.experts.{}.\2"
    ),
}


def _module(model: Any) -> KnownModel:
    name: str = type(model).__name__
    head = name.endswith(("ForCausalLM", "ForConditionalGeneration"))
    return KnownModel(
        _NAMES, {}, _TYPES, twin(name, model.config.model_type, head=head, same_paths=True)
    )


ENTRIES: Entries = {"easydel.infra.base_module.EasyDeLBaseModule": _module}
