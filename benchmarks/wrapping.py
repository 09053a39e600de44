"""What wrapping costs: a narrow Llama of 126 layers, 882 kernels, in nnx, linen and as a pytree.

    .venv/bin/python benchmarks/wrapping.py     under a minute; `make bench` prints it as well

Seconds to wrap it with all linear layers, to add a second adapter, and to trace a first call beside
the plain model's. Each is measured once, as a user meets it, after a smaller model has warmed up
whatever is compiled once for all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from randlora_jax import RandLoraConfig, get_peft_model

LAYERS, WIDTH = 126, 16
CONFIG = RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear")
VIEWS = {".*/(q|k|v|o|gate|up|down)": "i o"}
X = jnp.ones((2, 32, WIDTH))
Report = dict[str, dict[str, float]]


def block(layer: Callable[[str, int], Callable[[jax.Array], jax.Array]], x: jax.Array) -> jax.Array:
    """One layer of a Llama, but for positions and norms; `layer` gives each part by name."""
    q, k, v = (layer(name, WIDTH)(x) for name in "qkv")
    x = x + layer("o", WIDTH)(jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
    hidden = jax.nn.silu(layer("gate", 2 * WIDTH)(x)) * layer("up", 2 * WIDTH)(x)
    return x + layer("down", WIDTH)(hidden)


class NnxBlock(nnx.Module):
    """In nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            n_in = 2 * WIDTH if name == "down" else WIDTH
            n_out = 2 * WIDTH if name in ("gate", "up") else WIDTH
            setattr(self, name, nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        return block(lambda name, _: getattr(self, name), x)


class NnxLlama(nnx.Module):
    """Blocks in a list."""

    def __init__(self, depth: int) -> None:
        self.layers = nnx.List([NnxBlock(nnx.Rngs(i)) for i in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


class LinenBlock(nn.Module):
    """In linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        return block(lambda name, size: nn.Dense(size, use_bias=False, name=name), x)


class LinenLlama(nn.Module):
    """Blocks by number."""

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) to the same."""
        for _ in range(self.depth):
            x = LinenBlock()(x)
        return x


def in_nnx(depth: int) -> dict[str, float]:
    """Seconds of each."""

    def call(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
        graph, state = nnx.split(model)
        return lambda state, x: nnx.merge(graph, state)(x), state

    model = NnxLlama(depth)
    plain = traced(*call(model))
    wrap, wrapped = timed(lambda: get_peft_model(model, CONFIG))
    first = traced(*call(wrapped))
    add, _ = timed(lambda: wrapped.add_adapter("second", CONFIG))
    return {"wrap": wrap, "add": add, "trace plain": plain, "trace wrapped": first}


def in_linen(depth: int) -> dict[str, float]:
    """Seconds of each."""
    module = LinenLlama(depth)
    variables = filled(module)
    plain = traced(lambda variables, x: module.apply(variables, x), variables)
    wrap, wrapped = timed(lambda: get_peft_model(module.bind(variables), CONFIG))
    first = traced(lambda variables, x: wrapped.apply(variables, x), wrapped.variables)
    add, _ = timed(lambda: wrapped.add_adapter("second", CONFIG))
    return {"wrap": wrap, "add": add, "trace plain": plain, "trace wrapped": first}


def as_pytree(depth: int) -> dict[str, float]:
    """Seconds of each."""
    module = LinenLlama(depth)
    params = filled(module)["params"]
    plain = traced(lambda params, x: module.apply({"params": params}, x), params)
    wrap, wrapped = timed(lambda: get_peft_model(params, CONFIG, views=VIEWS))
    first = traced(
        lambda variables, x: module.apply({"params": wrapped.merged(variables)}, x),
        wrapped.variables,
    )
    add, _ = timed(lambda: wrapped.add_adapter("second", CONFIG))
    return {"wrap": wrap, "add": add, "trace plain": plain, "trace wrapped": first}


def filled(module: nn.Module) -> Any:
    """Variables of a module, without the seconds that drawing them takes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a job takes, and what it gives."""
    began = time.perf_counter()
    result = job()
    return time.perf_counter() - began, result


def traced(function: Callable[..., Any], state: Any) -> float:
    """Seconds to trace a first call."""
    return timed(lambda: jax.jit(function).trace(state, X))[0]


def wrapping() -> Report:
    """Of each way to hold a model."""
    kinds = {"flax.nnx": in_nnx, "flax.linen": in_linen, "params pytree": as_pytree}
    for measure in kinds.values():
        measure(2)
    return {name: measure(LAYERS) for name, measure in kinds.items()}


def table(report: Report) -> Table:
    """As people read it."""
    found = Table(title=f"Wrapping {LAYERS} layers, {7 * LAYERS} kernels; seconds")
    for title in ("", "wrap", "add a second", "trace plain", "trace wrapped", "ratio"):
        found.add_column(title, justify="right" if title else "left")
    for name, row in report.items():
        ratio = row["trace wrapped"] / row["trace plain"]
        found.add_row(name, *(f"{seconds:.2f}" for seconds in row.values()), f"{ratio:.2f}")
    return found


if __name__ == "__main__":
    Console().print(table(wrapping()))
    sys.exit()
