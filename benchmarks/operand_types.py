"""What a training step multiplies, by the type of its operands: of a bfloat16 layer inside a stack.

    python benchmarks/operand_types.py    # the table of docs/speed.md; nothing is run

Lowered for a GPU or a TPU, not compiled: a CPU emulates bfloat16, so that its seconds say nothing.
One layer's share is what a stack of three has more than a stack of two. The unit is 2 T d^2, what
the frozen layer's output costs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.mlir import ir

from randlora_jax import RandLoraConfig, get_peft_model

WIDTH, TOKENS_PER_WIDTH = 256, 16
PLATFORMS = ("cuda", "tpu")


def operations(module: Any) -> Iterator[Any]:
    """Every operation of a lowered program, as often as it is called."""
    functions = {f.attributes["sym_name"].value: f for f in module.body.operations}

    def inside(operation: Any) -> Iterator[Any]:
        for region in operation.regions:
            for block in region.blocks:
                for each in block.operations:
                    yield each
                    yield from inside(each)
                    if each.name == "func.call":
                        yield from inside(functions[each.attributes["callee"].value])

    return inside(functions["main"])


def products(lowered: Any) -> Mapping[str, float]:
    """Operations of the matrix products of a program by their operands' type; "mixed" if two."""
    found: Counter[str] = Counter()
    for operation in operations(lowered.compiler_ir()):
        if operation.name == "stablehlo.dot_general":
            left, right = (ir.RankedTensorType(one.type) for one in operation.operands)
            out = ir.RankedTensorType(operation.results[0].type)
            numbers = str(operation.attributes["dot_dimension_numbers"])
            summed = numbers.split("lhs_contracting_dimensions = [")[1].split("]")[0]
            depth = math.prod(left.shape[int(axis)] for axis in summed.split(","))
            types = {str(left.element_type), str(right.element_type)}
            kind = types.pop() if len(types) == 1 else "mixed"
            found[kind] += 2 * depth * math.prod(out.shape)
    return found


def arrays(lowered: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Type and shape of everything that a program computes."""
    for operation in operations(lowered.compiler_ir()):
        for result in operation.results:
            if isinstance(result.type, ir.RankedTensorType):
                yield str(result.type.element_type), tuple(result.type.shape)


def step(depth: int, apply: str | None, platform: str, width: int = WIDTH, r: int = 8) -> Any:
    """The lowered gradient of `depth` bfloat16 layers; `apply` None trains them whole."""
    layers = (nnx.Linear(width, width, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(depth))
    model: Any = nnx.Sequential(*layers)
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
    if apply is not None:
        config = RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules="all-linear")
        model = get_peft_model(model, config, apply=apply)
    graph, trained, rest = nnx.split(model, nnx.Param if apply is None else nnx.LoRAParam, ...)

    def gradient(trained: Any, rest: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda trained: nnx.merge(graph, trained, rest)(x), trained)[1](cotangent)

    x = jax.ShapeDtypeStruct((TOKENS_PER_WIDTH * width, width), jnp.bfloat16)
    return jax.jit(gradient).trace(trained, rest, x, x).lower(lowering_platforms=(platform,))


def of_one_layer(apply: str | None, platform: str) -> dict[str, float]:
    """Units of 2 T d^2 by operands' type, of a layer inside a stack."""
    three, two = (products(step(depth, apply, platform)) for depth in (3, 2))
    unit = 2 * TOKENS_PER_WIDTH * WIDTH**3
    return {kind: (three[kind] - two[kind]) / unit for kind in three}


def main() -> None:
    """The table."""
    ways = {"auto": "default", "merged": "merged", "factored": "factored", None: "everything"}
    print("| | bfloat16 | float32 | both in one product |\n|---|---|---|---|")
    for apply, name in ways.items():
        (found, other) = (of_one_layer(apply, platform) for platform in PLATFORMS)
        if found != other:
            raise SystemExit(f"{name}: {PLATFORMS[0]} {found}, {PLATFORMS[1]} {other}")
        units = (found.get(kind, 0.0) for kind in ("bf16", "f32", "mixed"))
        print(f"| {name} | {' | '.join(f'{unit:.2f}' for unit in units)} |")


if __name__ == "__main__":
    main()
