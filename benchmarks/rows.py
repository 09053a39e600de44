"""Decoding where each row of a batch has an adapter of its own: what it reads, counts and takes.

    python benchmarks/rows.py             # the widths of SmolLM2-135M, some layers of it
    python benchmarks/rows.py --counts    # no seconds

Bytes are counted in the traced program: of every matrix that is multiplied and depends on no
token, and of what is gathered for the rows. Seconds are of this machine's processors.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex

from randlora_jax import RandLoraConfig, get_peft_model

Taint = frozenset[str]  # what a value depends on: "tokens", "rows"
ROWS = 16


@dataclass(frozen=True)
class Widths:
    """Of a Llama."""

    hidden: int = 576
    heads: int = 9
    key_heads: int = 3
    inner: int = 1536
    depth: int = 6
    vocabulary: int = 64  # the head is not adapted: a large one would hide what layers read


class Block(nnx.Module):
    """A layer of Llama that decodes one token a row, over keys and values of those before it."""

    def __init__(self, widths: Widths, dtype: Any, rngs: nnx.Rngs) -> None:
        d, self.heads = widths.hidden, (widths.key_heads, widths.heads // widths.key_heads)
        narrow = d * widths.key_heads // widths.heads

        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(
                n_in, n_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

        self.q, self.o = linear(d, d), linear(d, d)
        self.k, self.v = linear(d, narrow), linear(d, narrow)
        self.gate, self.up = linear(d, widths.inner), linear(d, widths.inner)
        self.down = linear(widths.inner, d)
        self.norms = nnx.List([nnx.RMSNorm(d, dtype=dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array, cache: jax.Array) -> jax.Array:
        """x (rows, 1, hidden); cache (rows, length, 2, key heads, head width)."""
        h = self.norms[0](x)
        q = self.q(h).reshape(x.shape[0], *self.heads, -1)
        now = jnp.stack([self.k(h), self.v(h)], 2).reshape(x.shape[0], 1, *cache.shape[2:])
        keys, values = jnp.moveaxis(jnp.concatenate([cache, now], 1), 2, 0)
        scores = jnp.einsum("rkgh,rlkh->rkgl", q, keys) / math.sqrt(q.shape[-1])
        seen = jnp.einsum("rkgl,rlkh->rkgh", jax.nn.softmax(scores), values)
        x = x + self.o(seen.reshape(x.shape))
        h = self.norms[1](x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Enough of one to decode a token."""

    def __init__(self, widths: Widths, dtype: Any, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(widths.vocabulary, widths.hidden, param_dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(widths, dtype, rngs) for _ in range(widths.depth)])
        self.norm = nnx.RMSNorm(widths.hidden, dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, caches: jax.Array) -> jax.Array:
        """ids (rows, 1), caches (depth, rows, length, 2, key heads, head width); logits."""
        x = self.embedding(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.embedding.attend(self.norm(x))


def adapted(widths: Widths, dtype: Any, r: int, adapters: int = ROWS) -> Any:
    """A Llama with adapters "0", "1", ... of random numbers, in every layer."""
    config = RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules="all-linear")
    model = get_peft_model(Llama(widths, dtype, nnx.Rngs(0)), config, adapter_name="0")
    for i in range(1, adapters):
        model.add_adapter(str(i), config)
    keys = iter(jax.random.split(jax.random.key(1), 10_000))
    for i in range(adapters):
        model.set_adapter(str(i))
        state = nnx.state(model, nnx.LoRAParam)
        moved = jax.tree.map(
            lambda x: x + 0.01 * jax.random.normal(next(keys), x.shape, x.dtype), state
        )
        nnx.update(model, moved)
    model.set_adapter("0")
    return model


def decoding(model: Any, widths: Widths, dtype: Any, length: int = 16) -> tuple[Any, ...]:
    """A decode step of `model` as a function of (state, rows, ids, caches), and these arrays.

    `rows` are slots, or None to apply what is active.
    """
    graph, state = nnx.split(model)
    head = widths.hidden // widths.heads
    shape = (widths.depth, ROWS, length, 2, widths.key_heads, head)
    caches = jax.random.normal(jax.random.key(2), shape, dtype)
    ids = jax.random.randint(jax.random.key(3), (ROWS, 1), 0, widths.vocabulary)

    def step(state: Any, rows: Any, ids: jax.Array, caches: jax.Array) -> jax.Array:
        more = {} if rows is None else {"adapter_names": rows}
        return nnx.merge(graph, state)(ids, caches, **more)

    return step, state, ids, caches


def reads(step: Callable[..., Any], state: Any, rows: Any, *tokens: jax.Array) -> Counter[str]:
    """Bytes that a step reads, of every product's operands that depend on no token.

    "shared" for what all rows read; "gathered" for what is picked for the rows.
    """
    closed = jax.make_jaxpr(step)(state, rows, *tokens)
    taints: list[Taint] = []
    for arrays, taint in ((state, ""), (rows, "rows"), (tokens, "tokens")):
        taints += [frozenset({taint} - {""})] * len(jax.tree.leaves(arrays))
    found: Counter[str] = Counter()
    _follow(closed.jaxpr, taints, found)
    return found


def _follow(jaxpr: Any, taints: list[Taint], found: Counter[str]) -> list[Taint]:
    """The taints of a jaxpr's results, while what it reads is counted."""
    known = dict(zip(jaxpr.invars, taints, strict=True))

    def taint(atom: Any) -> Taint:
        return frozenset() if isinstance(atom, jex.Literal) else known.get(atom, frozenset())

    for equation in jaxpr.eqns:
        mine = [taint(x) for x in equation.invars]
        out = [frozenset[str]().union(*mine)] * len(equation.outvars)
        if equation.primitive.name == "dot_general":
            for operand, of in zip(equation.invars, mine, strict=True):
                if "tokens" not in of and "rows" not in of:
                    found["shared"] += _bytes(operand)
        elif equation.primitive.name == "gather" and "rows" in mine[1] and "tokens" not in out[0]:
            found["gathered"] += _bytes(equation.outvars[0])
        for inner in _inner(equation):
            out = _follow(inner, mine, found)
        known |= dict(zip(equation.outvars, out, strict=True))
    return [taint(x) for x in jaxpr.outvars]


def _inner(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns"):
            assert equation.primitive.name not in ("scan", "while"), "its length is not counted"
            yield jaxpr


def _bytes(atom: Any) -> int:
    return int(math.prod(atom.aval.shape)) * atom.aval.dtype.itemsize


def flops(step: Callable[..., Any], *arrays: Any) -> float:
    """Operations of a step, as XLA counts those of the program it is given."""
    return float(jax.jit(step).lower(*arrays).cost_analysis()["flops"])


@dataclass(frozen=True)
class Decoding:
    """Programs that decode 16 rows: the base model, one adapter for all, and one for each."""

    widths: Widths
    dtype: Any
    r: int

    def programs(self) -> dict[str, tuple[Any, ...]]:
        """(step, its arrays...) by name."""
        base = Llama(self.widths, self.dtype, nnx.Rngs(0))
        model = adapted(self.widths, self.dtype, self.r)
        found = {}
        for name, one, rows in (("base", base, None), ("one adapter", model, None)):
            step, state, *tokens = decoding(one, self.widths, self.dtype)
            found[name] = (step, state, rows, *tokens)
        model.stack_adapters()
        step, state, *tokens = decoding(model, self.widths, self.dtype)
        each = model.rows([str(i) for i in range(ROWS)])
        found["16 adapters"] = (step, state, each, *tokens)
        return found

    def own_bytes(self) -> int:
        """Lambda and gamma of 16 adapters."""
        d, w = self.widths.hidden, self.widths
        narrow = d * w.key_heads // w.heads
        lows = [d, d, narrow, narrow, d, d, d]
        each = sum(-(-low // self.r) * (self.r + low) for low in lows)
        return 4 * ROWS * w.depth * each


def seconds(programs: dict[str, tuple[Any, ...]], repeats: int = 30) -> dict[str, float]:
    """The median of each, in turns."""
    compiled = {}
    for name, (step, *arrays) in programs.items():
        compiled[name] = jax.jit(step).lower(*arrays).compile(), arrays
    took: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (run, arrays) in compiled.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            took[name].append(time.perf_counter() - begun)
    return {name: float(np.median(times)) for name, times in took.items()}


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", action="store_true", help="measure no seconds")
    parser.add_argument("-r", type=int, default=32)
    options = parser.parse_args()
    print("| | reads, shared | gathered, of lambda and gamma | operations | words a second |")
    print("|---|---|---|---|---|")
    for dtype in (jnp.float32, jnp.bfloat16):
        run = Decoding(Widths(), dtype, options.r)
        programs = run.programs()
        read = {name: reads(*program) for name, program in programs.items()}
        count = {name: flops(*program) for name, program in programs.items()}
        timed = dtype == jnp.float32 and not options.counts  # CPUs emulate bfloat16
        took = seconds(programs) if timed else {}
        for name in programs:
            share = read[name]["shared"] / read["base"]["shared"]
            own = read[name]["gathered"] / run.own_bytes()
            ratio = count[name] / count["one adapter"]
            words = f"{ROWS / took[name]:.0f}" if name in took else ""
            print(
                f"| {name}, {jnp.dtype(dtype)} | {share:.2f} | {own:.2f} | {ratio:.2f} | {words} |"
            )


if __name__ == "__main__":
    main()
