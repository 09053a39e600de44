"""What a wrapped model says of itself, in words."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from randlora_jax.core.bases import used_extents
from randlora_jax.core.cost import Sizes, explained_rows
from randlora_jax.core.cost import explained as explained_kind
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.ways import ExecutionOptions, PossibleWays, possible_ways, require_a_way
from randlora_jax.models.layer import Layer, LayerRun
from randlora_jax.models.names import Path
from randlora_jax.models.registry import AdapterRegistry, AdapterState


def summary(
    kind: str, base: str, registry: AdapterRegistry, states: Mapping[str, AdapterState]
) -> str:
    """A line on the model, and one on each adapter."""
    off = "" if registry.enabled else "; adapters are off"
    lines = [f"{kind} of {base}: {len(registry.layers)} layers that can be adapted{off}"]
    for name, state in states.items():
        config = registry.configs[name]
        marks = ["active"] * (name in registry.active) + ["merged"] * (name in registry.merged)
        marks += ["trained"] * (name in registry.training)
        size = registry.trained_part(name, state).size()
        lines.append(
            f"  {name!r} ({', '.join(marks) or 'not active'}): r {config.r}, "
            f"alpha {config.randlora_alpha}, {len(state.layers)} layers, {size:,} numbers"
        )
    return "\n".join(lines if states else [*lines, "  no adapter"])


def explained(
    layers: Sequence[Layer],
    base: Mapping[Path, jax.Array],
    runs: Mapping[str, LayerRun],
    r: int,
    tokens: int,
    options: ExecutionOptions,
    rows: int | None = None,
) -> str:
    """How layers run: one entry for those that are alike.

    Args:
      runs: by `Layer.name`.
      rows: of the batch, where each has an adapter of its own.

    Raises:
      ConfigError: a layer cannot run at all.
    """
    alike: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        call, dtype = runs[layer.name]
        kind = (layer.matrix, call, jnp.dtype(dtype), base[layer.kernel_path].dtype)
        alike.setdefault(kind, []).append(layer)
    entries = []
    for first, *others in alike.values():
        possible = _possible(first, base, runs[first.name], options)
        names = first.name + (f" and {len(others)} more" if others else "")
        flat_rank = used_extents(first.matrix, r).n * r
        sizes = Sizes.in_dtype(runs[first.name].dtype, tokens, *first.matrix, flat_rank)
        entries.append(
            explained_kind(names, possible, sizes)
            if rows is None
            else explained_rows(names, possible, sizes, rows, r)
        )
    return "\n".join(entries)


def _possible(
    layer: Layer,
    base: Mapping[Path, jax.Array],
    run: LayerRun,
    options: ExecutionOptions,
) -> PossibleWays:
    kernel = Kernel(base[layer.kernel_path], layer.layout, packed=layer.packed)
    possible = possible_ways(kernel, *run, options)
    require_a_way(layer.name, possible)
    return possible
