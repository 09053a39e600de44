"""What XLA's TPU compiler makes of a bfloat16 step: temporary bytes, operations; no TPU needed.

    make tpu        nine minutes on two cores

Layers of Llama-3.2-1B (tunix's class, by shape alone) and a short vocabulary, all seven linear
layers of each adapted; the gradient of a loss, for one chip. One layer's share is what four layers
have more than two. What is kept for the backward pass depends on `remat`: everything, or nothing
inside a decoder layer.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would look for a TPU's host
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import jax
import jax.numpy as jnp
import tuning
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tunix.models.llama3 import model as llama3

from randlora_jax import RandLoraConfig, get_peft_model

DOCUMENTS, LENGTH = 8, 1024
CHIP = "v5e:2x2"


class Costs(NamedTuple):
    """Of a compiled step: bytes that only live during it, and operations."""

    temporary: float
    flops: float


def build(method: str, layers: int, remat: llama3.RematConfig) -> Any:
    """A model in bfloat16, ready to be trained."""
    shape = dataclasses.replace(
        llama3.ModelConfig.llama3p2_1b(), num_layers=layers, vocab_size=1024, remat_config=remat
    )
    model = llama3.Llama3(shape, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    if method == "LoRA":
        return tuning.lora(model, rank=16)
    if method == "full":
        return model
    config = RandLoraConfig(r=32, randlora_alpha=64, target_modules="all-linear")
    return get_peft_model(model, config, apply=method)


def compiled(method: str, layers: int, remat: llama3.RematConfig, chip: Any) -> Costs:
    """The costs of a gradient."""
    model = nnx.eval_shape(partial(build, method, layers, remat))
    trains = nnx.Param if method == "full" else nnx.LoRAParam
    graph, trained, rest = nnx.split(model, trains, ...)

    def gradient(trained: Any, rest: Any, tokens: Any, places: Any, mask: Any) -> Any:
        def loss(model: Any) -> jax.Array:
            scores, _ = model(tokens, places, None, mask)
            return (scores.astype(jnp.float32) ** 2).mean()

        model = nnx.merge(graph, trained, rest)
        return nnx.grad(loss, argnums=nnx.DiffState(0, trains))(model)

    on_chip = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(chip))
    place = partial(jax.tree.map, lambda x: on_chip(x.shape, x.dtype))
    tokens = on_chip((DOCUMENTS, LENGTH), jnp.int32)
    mask = on_chip((DOCUMENTS, LENGTH, LENGTH), jnp.bool_)
    step = jax.jit(gradient).lower(place(trained), place(rest), tokens, tokens, mask).compile()
    return Costs(step.memory_analysis().temp_size_in_bytes, step.cost_analysis()["flops"])


def main() -> None:
    """The table."""
    warnings.simplefilter("ignore")
    chip = topologies.get_topology_desc(platform="tpu", topology_name=CHIP).devices[0]
    methods = {"LoRA": "LoRA (qwix), rank 16", "full": "full fine-tuning"}
    methods |= {"auto": "RandLoRA, default", "merged": 'RandLoRA, `apply="merged"`'}
    print("| a layer's share | kept inside it: temporary MB | TFLOP | rebuilt: MB | TFLOP |")
    print("|---|---|---|---|---|")
    for method, name in methods.items():
        cells = []
        for remat in (llama3.RematConfig.NONE, llama3.RematConfig.DECODER):
            four, two = (compiled(method, layers, remat, chip) for layers in (4, 2))
            cells += [
                f"{(four.temporary - two.temporary) / 2e6:.0f}",
                f"{(four.flops - two.flops) / 2e12:.3f}",
            ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
