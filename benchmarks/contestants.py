"""The ways to fine-tune that are compared: one training step each, on equal terms.

Same model, same tokens, float32, AdamW at the same rate, the mean square of the last hidden states
as the loss. LoRA has rank 8, which trains about as many numbers as RandLoRA at rank 32.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import qwix
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from planned import planned_bytes
from shapes import Shape
from torch.utils.flop_counter import FlopCounterMode

from randlora_jax import RandLoraConfig, get_peft_model

RATE = 1e-4
RANK, LORA_RANK = 32, 8
Tree = Any


@dataclass
class Contestant:
    """One way to fine-tune: `step` runs a training step and waits for it, and has run once."""

    name: str
    step: Callable[[], float]
    trained: int
    flops: float
    temporary: int | None = None  # bytes; None where the framework does not tell
    peak: int | None = None
    compile_seconds: float | None = None
    program: str | None = None  # a digest of what was compiled: equal for equal programs


Made = Sequence[Contestant]
# (model, tokens, what was made for them before) -> one more
Builder = Callable[..., Contestant]


# --- PyTorch --------------------------------------------------------------------------------------


def torch_contestant(name: str, model: Any, tokens: np.ndarray) -> Contestant:
    """A step of a PyTorch model on whatever of it is trainable."""
    ids, trained = torch.tensor(tokens), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(input_ids=ids).last_hidden_state ** 2).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    with FlopCounterMode(display=False) as counter:
        step()
    return Contestant(name, step, sum(p.numel() for p in trained), counter.get_total_flops())


def peft_lora(shape: Shape, tokens: np.ndarray, _: Made = ()) -> Contestant:
    """PEFT's LoRA."""
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=16, target_modules=shape.targets)
    return torch_contestant("PEFT LoRA", peft.get_peft_model(shape.torch(), config), tokens)


def peft_randlora(shape: Shape, tokens: np.ndarray, _: Made = ()) -> Contestant:
    """PEFT's RandLoRA."""
    config = peft.RandLoraConfig(r=RANK, randlora_alpha=64, target_modules=shape.targets)
    return torch_contestant("PEFT RandLoRA", peft.get_peft_model(shape.torch(), config), tokens)


def torch_full(shape: Shape, tokens: np.ndarray, _: Made = ()) -> Contestant:
    """Everything, in PyTorch."""
    return torch_contestant("PyTorch full", shape.torch(), tokens)


# --- JAX ------------------------------------------------------------------------------------------


def jax_contestant(
    name: str,
    hidden: Callable[[Tree, Tree, dict[str, Any]], jax.Array],
    trained: Tree,
    frozen: Tree,
    tokens: np.ndarray,
    made: Made = (),
) -> Contestant:
    """A step of a function of (trained, frozen, inputs), compiled ahead.

    Args:
      made: contestants of the same model and tokens; one with the very same program serves twice,
        since what two runs of it differ by is the machine.
    """
    tx = optax.adamw(RATE)
    ids = jnp.asarray(tokens, jnp.int32)
    inputs = {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "position_ids": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    }

    def one(trained: Tree, state: Tree, frozen: Tree, inputs: Tree) -> tuple[Tree, Tree, jax.Array]:
        def loss(trained: Tree) -> jax.Array:
            return (hidden(trained, frozen, inputs) ** 2).mean()

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    # our own copy, which a step may overwrite; the model's arrays are shared by all contestants
    trained = jax.tree.map(jnp.copy, trained)
    state = tx.init(trained)
    began = time.perf_counter()
    lowered = jax.jit(one, donate_argnums=(0, 1)).lower(trained, state, frozen, inputs)
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    for other in made:
        if other.program == program:
            return replace(other, name=name)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    now = [trained, state]

    def step() -> float:
        *now[:], value = compiled(*now, frozen, inputs)
        return float(value)

    step()
    return Contestant(
        name,
        step,
        sum(x.size for x in jax.tree.leaves(trained)),
        compiled.cost_analysis()["flops"],
        compiled.memory_analysis().temp_size_in_bytes,
        planned_bytes(compiled),
        seconds,
        program,
    )


def _extra(shape: Shape) -> dict[str, Any]:
    """What the model's linen module wants besides the tokens."""
    is_bert = shape.name.startswith("MiniLM")
    return {"token_type_ids": None, "head_mask": None} if is_bert else {}


def jax_full(shape: Shape, tokens: np.ndarray, _: Made = ()) -> Contestant:
    """Everything, in JAX."""

    def hidden(params: Tree, _: Tree, inputs: dict[str, Any]) -> jax.Array:
        out = shape.flax.module.apply({"params": params}, **inputs, **_extra(shape))
        return out.last_hidden_state

    return jax_contestant("JAX full", hidden, shape.flax.params, {}, tokens)


def jax_lora(shape: Shape, tokens: np.ndarray, _: Made = ()) -> Contestant:
    """qwix's LoRA around the same module."""
    block = "(.*/)?encoder/.*" if shape.name.startswith("MiniLM") else ".*layers/.*"
    provider = qwix.LoraProvider(module_path=block, rank=LORA_RANK, alpha=16.0)
    module = qwix.apply_lora_to_model(shape.flax.module, provider)
    one = jnp.ones((1, 8), jnp.int32)
    few = {"input_ids": one, "attention_mask": one, "position_ids": jnp.arange(8)[None]}
    made = flatten_dict(module.init(jax.random.key(0), **few, **_extra(shape))["params"])
    lora = {path: x for path, x in made.items() if "lora" in path[-1]}
    base = flatten_dict(shape.flax.params)
    if set(made) - set(lora) != set(base) or not lora:
        raise SystemExit(f"{shape.name}: qwix's LoRA and the base model have different leaves")

    def hidden(lora: Tree, base: Tree, inputs: dict[str, Any]) -> jax.Array:
        params = unflatten_dict({**base, **lora})
        return module.apply({"params": params}, **inputs, **_extra(shape)).last_hidden_state

    return jax_contestant("JAX LoRA (qwix)", hidden, lora, base, tokens)


def ours(apply: str, **kind: bool) -> Builder:
    """This library's RandLoRA; `kind` of bases: dense, or as in `RandLoraConfig`."""

    def build(shape: Shape, tokens: np.ndarray, made: Made = ()) -> Contestant:
        config = RandLoraConfig(r=RANK, randlora_alpha=64, target_modules=shape.targets, **kind)
        model = get_peft_model(shape.flax, config, apply=apply)
        trained, frozen = model.split()

        def hidden(trained: Tree, frozen: Tree, inputs: dict[str, Any]) -> jax.Array:
            variables = {**frozen, "randlora": trained}
            return model.apply(variables, **inputs, **_extra(shape)).last_hidden_state

        name = ", ".join(["ours", apply, *(word.replace("_", " ") for word in kind)])
        return jax_contestant(name, hidden, trained, frozen, tokens, made)

    return build


ALL = [
    peft_lora,
    peft_randlora,
    torch_full,
    jax_lora,
    jax_full,
    ours("factored"),
    ours("merged"),
    ours("auto"),
]
JUDGED = [peft_randlora, jax_full, ours("auto")]
# what ternary bases, int8 in memory, change
KINDS = [ours("auto"), ours("auto", sparse=True), ours("auto", very_sparse=True)]
SWEPT = [peft_randlora, ours("factored"), ours("merged"), ours("auto")]
