"""A training step of a large Llama on a mesh, by shape alone: tunix's class, a method, AdamW.

As a program it compiles one step for chips that are not here; `scale.py` starts it:

    python benchmarks/scale_step.py 8B RandLoRA 4 2 1 build/scale
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would look for a TPU's host

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.models.llama3 import model as llama3

from randlora_jax import RandLoraConfig, get_peft_model

RANK, RATE = 32, 1e-4
AXES = ("fsdp", "tp")
APPLY = {"RandLoRA": "auto", "RandLoRA, merged": "merged"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained, and on what.

    Args:
      shape: of the model.
      chips: their topology, as libtpu calls it.
      lora_rank: which trains about as many numbers as RandLoRA.
      documents, length: of a step's tokens.
    """

    shape: llama3.ModelConfig
    chips: str
    lora_rank: int
    documents: int
    length: int


JOBS = {
    "8B": Job(llama3.ModelConfig.llama3p1_8b(), "v5p:2x2x2", 32, 32, 2048),
    "70B": Job(llama3.ModelConfig.llama3_70b(), "v5p:4x4x4", 64, 256, 2048),
}
# Else gathers and sums beside a product become loops that send a part at each turn.
LOOPS = ("all_gather", "reduce_scatter")
WHOLE = {f"xla_tpu_enable_windowed_einsum_for_{kind}": False for kind in LOOPS}


def base(shape: llama3.ModelConfig) -> llama3.Llama3:
    """The model in bfloat16; what is made inside a decoder layer is made again backwards."""
    shape = dataclasses.replace(shape, remat_config=llama3.RematConfig.DECODER)
    model = llama3.Llama3(shape, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    return model


def with_lora(shape: llama3.ModelConfig, rank: int) -> Any:
    """The same with qwix's LoRA around all linear layers but the head."""
    model = base(shape)
    kinds = ".*(q|k|v|o|gate|up|down)_proj"
    provider = qwix.LoraProvider(module_path=kinds, rank=rank, alpha=2.0 * rank)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes that lie where `shardings` say."""
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, shardings
    )


def model_on(mesh: Mesh, job: Job, method: str) -> tuple[Any, Any]:
    """The abstract model on a mesh, as its author cuts it, and the type of what trains.

    Args:
      method: "LoRA", "full", or one of `APPLY`.
    """
    made = partial(with_lora, rank=job.lora_rank) if method == "LoRA" else base
    model = nnx.eval_shape(partial(made, job.shape))
    state = nnx.state(model)
    cut = partial(NamedSharding, mesh)
    nnx.update(model, placed(state, jax.tree.map(cut, nnx.get_partition_spec(state))))
    if method not in APPLY:
        return model, nnx.Param if method == "full" else nnx.LoRAParam
    config = RandLoraConfig(r=RANK, randlora_alpha=2 * RANK, target_modules="all-linear")
    wrapped = get_peft_model(model, config, apply=APPLY[method], token_axes=[AXES[0]])
    return wrapped, nnx.LoRAParam


def step(mesh: Mesh, job: Job, method: str) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """A jitted step, forward, backward and AdamW, and shapes of all its arguments.

    Third, what can be said without a compiler: how many numbers train, and `model.memory()`.
    """
    # tunix says this itself where the process has accelerators; here they are only compiled for
    llama3.shard = lambda x, spec: jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, P(*spec))
    )
    model, kind = model_on(mesh, job, method)
    graph, trained, rest = nnx.split(model, kind, ...)
    tx, whole = optax.adamw(RATE), NamedSharding(mesh, P())
    moments = optax.tree_utils.tree_map_params(
        tx,
        lambda x, of: placed(x, of.sharding),
        jax.eval_shape(tx.init, trained),
        trained,
        transform_non_params=lambda x: placed(x, whole),
    )

    def one(trained: Any, moments: Any, rest: Any, tokens: Any, places: Any, mask: Any) -> Any:
        def loss(model: Any) -> jax.Array:
            scores, _ = model(tokens, places, None, mask)
            scores, following = scores.astype(jnp.float32), jnp.roll(tokens, -1, axis=1)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, following)
            return losses[:, :-1].mean()

        model = nnx.merge(graph, trained, rest)
        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        updates, moments = tx.update(gradients, moments, trained)
        return optax.apply_updates(trained, updates), moments, value

    rows = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P(AXES[0])))
    size = (job.documents, job.length)
    tokens, mask = rows(size, jnp.int32), rows((*size, job.length), jnp.bool_)
    lie = jax.tree.map(lambda x: x.sharding, (trained, moments))
    jitted = jax.jit(one, donate_argnums=(0, 1), out_shardings=(*lie, whole))
    told = {"trained": sum(x.size for x in jax.tree.leaves(trained))}
    if method in APPLY:
        told |= {f"memory {kind}": nbytes for kind, nbytes in model.memory()._asdict().items()}
    return jitted, (trained, moments, rest, tokens, tokens, mask), told


def mesh_of(chips: str, fsdp: int, tp: int) -> Mesh:
    """Of a topology's chips, none of which is here."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chips)
    return topologies.make_mesh(topology, (fsdp, tp), AXES)


def main(name: str, method: str, fsdp: str, tp: str, layers: str, folder: str) -> None:
    """Compiles a step of so many layers; XLA writes what it makes of it into `folder`."""
    job = JOBS[name]
    job = dataclasses.replace(job, shape=dataclasses.replace(job.shape, num_layers=int(layers)))
    jitted, arguments, told = step(mesh_of(job.chips, int(fsdp), int(tp)), job, method)
    (Path(folder) / "told.json").write_text(json.dumps(told))
    options = {**WHOLE, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    jitted.lower(*arguments).compile(compiler_options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
