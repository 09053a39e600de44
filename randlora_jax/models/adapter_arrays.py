"""The arrays of adapters: fresh ones, the updates they make, kernels with updates merged in."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from randlora_jax.core.abstract import is_abstract, moved, put, shape_of, some_abstract
from randlora_jax.core.bases import BasisIdentity, BasisPair, Extents, used_extents
from randlora_jax.core.hoisting import is_traced
from randlora_jax.core.kernel import Kernel, merged
from randlora_jax.core.mesh import on_mesh
from randlora_jax.core.update import Update, at_least_float32, holds_sums
from randlora_jax.interop import targets
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError, shown
from randlora_jax.models import basis_source, drawing
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import TORCH_LEAF, Path, dotted
from randlora_jax.models.quantised import are_integers, array_of
from randlora_jax.models.registry import AdapterRegistry, AdapterState

Leaves = Mapping[Path, jax.Array]


def fresh_state(
    registry: AdapterRegistry,
    base: Leaves,
    config: RandLoraConfig,
    chosen: Iterable[Layer],
    rngs: Any,
) -> AdapterState:
    """Lambda zero, gamma 1 / max(n, min), as PEFT initialises them; copies of what trains whole.

    Abstract where the base model is.

    Args:
      rngs: an ``nnx.Rngs`` or a ``jax.random.key``, for ``init_weights=False``.

    Raises:
      ConfigError: ``init_weights=False`` without `rngs`, or without what it draws from in these.
    """
    key = None
    if not config.init_weights:
        if rngs is None:
            raise ConfigError(
                "init_weights=False draws lambda at random: pass rngs=nnx.Rngs(seed) or a jax key"
            )
        drawing.refuse_without(rngs, "params", "init_weights=False")
        key = rngs
    layers = {}
    for i, layer in enumerate(chosen):
        drawn = None
        if key is not None:
            drawn = jax.random.fold_in(key if isinstance(key, jax.Array) else key.params(), i)
        layers[layer.name] = _fresh(layer, config, base[layer.kernel_path], drawn)
    whole = whole_paths(registry, base, config, layers)
    # arrays of their own, so that they can be donated
    return AdapterState(layers, {path: _copied(base[path]) for path in whole})


def _copied(leaf: Any) -> Any:
    dtype = at_least_float32(leaf.dtype)
    return shape_of(leaf, leaf.sharding, dtype) if is_abstract(leaf) else jnp.array(leaf, dtype)


def _fresh(
    layer: Layer, config: RandLoraConfig, kernel: Any, key: jax.Array | None
) -> tuple[Any, Any]:
    """Lambda and gamma of the layer of a kernel; lambda drawn if there is a key.

    In NumPy where nothing is drawn: `placed` puts all of an adapter on devices at once.
    """
    _, n, smallest = used_extents(layer.matrix, config.r)
    largest = max(n, smallest) if key is None else max(layer.matrix)
    shape = (*layer.stack, config.r, n)
    if is_abstract(kernel):
        other = jax.ShapeDtypeStruct((*layer.stack, n, smallest), jnp.float32)
        return jax.ShapeDtypeStruct(shape, jnp.float32), other
    dtype = kernel.dtype
    # PEFT makes gamma in the base layer's dtype and keeps it in float32 afterwards; in 8 bits it
    # would be zero, and so would lambda's gradient
    held = dtype if holds_sums(dtype) else np.float32
    start = np.float32(1 / largest).astype(held).astype(np.float32)
    gamma = np.full((*layer.stack, n, smallest), start)
    if key is None:
        return np.zeros(shape, np.float32), gamma
    return jax.random.normal(key, shape, jnp.float32), gamma


def whole_paths(
    registry: AdapterRegistry, base: Leaves, config: RandLoraConfig, adapted: Collection[str]
) -> list[Path]:
    """The base leaves that an adapter trains whole: of modules_to_save, and biases.

    Args:
      adapted: the adapter's layers, by `Layer.name`.

    Raises:
      ConfigError: one holds no floats.
      TargetError: they are a part of the layers that one array holds.
    """
    patterns = targets.saved_modules(config)
    if config.bias == "none" and not patterns:
        return []

    def trains(path: Path) -> bool:
        bias = TORCH_LEAF.get(path[-1]) == "bias" and (
            config.bias == "all"
            or (config.bias == "randlora_only" and dotted(path[:-1]) in adapted)
        )
        return bias or registry.is_whole(path, patterns)

    whole = list(filter(trains, base))
    for path in whole:
        _refuse_integers(path, base[path].dtype, config)
    return whole


def _refuse_integers(path: Path, dtype: DTypeLike, config: RandLoraConfig) -> None:
    """Nothing, if steps can move the numbers of a leaf that is to be trained whole.

    Raises:
      ConfigError: it holds what a quantiser counts in, or other integers.
    """
    if holds_sums(dtype):
        return
    made = are_integers(path)
    way_out = (
        "quantise without this module (a rule with another module_path)"
        if made
        else ("hold it in floats")
    )
    raise ConfigError(
        f"modules_to_save={shown(config.modules_to_save)} with task_type={shown(config.task_type)} "
        f"trains {dotted(array_of(path))!r} whole: expected floats of 16 "
        f"bits or more, which steps can move, found {dtype} numbers: {way_out}, or let "
        "target_modules adapt it"
    )


def trained_whole(states: Mapping[str, AdapterState]) -> dict[Path, jax.Array]:
    """What adapters that are applied together trained whole, by path in the model.

    Raises:
      ConfigError: two of them trained the same, and the model has room for one, as in PEFT.
    """
    found: dict[Path, jax.Array] = {}
    owners: dict[Path, str] = {}
    for name, state in states.items():
        for path, leaf in state.saved.items():
            if path in owners:
                raise ConfigError(
                    f"adapters {owners[path]!r} and {name!r} both trained {dotted(path)!r} whole "
                    "(modules_to_save, a task's head, or bias), or have it in their files, and "
                    "only one of them can take its place: apply them one at a time, as in PEFT"
                )
            found[path], owners[path] = leaf, name
    return found


def is_fresh(state: AdapterState) -> bool:
    """Whether an adapter adds nothing: it has numbers, and every lambda is zero."""
    lams = [lam for lam, _ in state.layers.values()]
    return not some_abstract(lams) and not any(map(jnp.any, lams))


def added_size(registry: AdapterRegistry, adapter_name: str, state: AdapterState) -> int:
    """How many numbers a model has more with an adapter, as PEFT counts.

    A module trained whole is a copy beside the original; a bias is the original, and so is what is
    carried.
    """
    whole = targets.saved_modules(registry.configs[adapter_name])
    others = (leaf.size for path, leaf in state.saved.items() if not registry.is_whole(path, whole))
    return state.size() - sum(others)


def placed(registry: AdapterRegistry, base: Leaves, state: AdapterState) -> AdapterState:
    """An adapter's arrays where the base model's lie: lambda and gamma on every device."""
    layers = put(state.layers, registry.replicated(base))
    saved = {p: put(x, on_mesh(base[p])) for p, x in state.saved.items()}
    return AdapterState(layers, saved)


def in_base_dtype(registry: AdapterRegistry, base: Leaves, state: AdapterState) -> AdapterState:
    """An adapter's arrays in the dtype of what they are for, where that has 16 bits."""

    def cast(x: Any, leaf: Any) -> Any:
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2
        return moved(lambda x: x.astype(leaf.dtype), x) if narrow else x

    def kernel(name: str) -> Any:
        return base[registry.layers[name].kernel_path]

    layers = {
        name: (cast(lam, kernel(name)), cast(gamma, kernel(name)))
        for name, (lam, gamma) in state.layers.items()
    }
    return AdapterState(layers, {path: cast(x, base[path]) for path, x in state.saved.items()})


def shared_pairs(
    registry: AdapterRegistry, base: Leaves, states: Mapping[str, AdapterState]
) -> dict[str, BasisPair]:
    """One pair for each identity that the adapters of `states` use, of just what layers slice."""
    where = registry.replicated(base)
    return {
        str(identity): basis_source.device_pair(identity, extents, registry.kept_pairs, where)
        for identity, extents in _needed(registry, states).items()
    }


def redrawn(
    registry: AdapterRegistry, base: Leaves, held: Mapping[str, BasisPair]
) -> dict[str, BasisPair]:
    """The pairs in `held`, of a model with stacks, drawn anew at their sizes."""
    where = registry.replicated(base)
    identities = {stack.name: stack.identity for stack in registry.stacks}
    return {
        name: basis_source.device_pair(
            identities[name],
            Extents(pair.B.shape[0], pair.B.shape[1], pair.A.shape[1]),
            registry.kept_pairs,
            where,
        )
        for name, pair in held.items()
    }


def is_corner(pair: BasisPair, whole: BasisPair) -> bool:
    """Whether `pair` is the leading corner of `whole`, as far as numbers can be looked at."""
    if is_traced(whole) or any(x.is_deleted() for x in whole):
        return True
    (_, smallest), (largest, n, _) = pair.A.shape, pair.B.shape
    corner = whole.A[:, :smallest], whole.B[:largest, :n]
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(pair, corner, strict=True))


def abstract_pairs(
    registry: AdapterRegistry, base: Leaves, states: Mapping[str, AdapterState]
) -> dict[str, BasisPair]:
    """The shapes of `shared_pairs`."""
    drawn = jax.eval_shape(lambda: shared_pairs(registry, base, states))
    shapes = jax.tree.map(partial(shape_of, sharding=registry.replicated(base)), drawn)
    return cast(dict[str, BasisPair], shapes)


def _needed(
    registry: AdapterRegistry, states: Mapping[str, AdapterState]
) -> dict[BasisIdentity, Extents]:
    """The pairs that the adapters of `states` use."""
    needed: dict[BasisIdentity, Extents] = {}
    for name, state in states.items():
        identity = registry.specs[name].identity
        extents = registry.used_extents(registry.specs[name], state.layers)
        needed[identity] = extents.union(needed.get(identity, extents))
    return needed


def updates_by_layer(
    registry: AdapterRegistry,
    states: Mapping[str, AdapterState],
    pairs: Mapping[str, BasisPair],
) -> dict[str, list[Update]]:
    """What each layer gets from the adapters of `states`, by `Layer.name`."""
    updates: dict[str, list[Update]] = {}
    for name, state in states.items():
        for layer, (lam, gamma) in state.layers.items():
            matrix = registry.layers[layer].matrix
            update = registry.specs[name].update(lam, gamma, pairs, matrix)
            updates.setdefault(layer, []).append(update)
    return updates


def merged_kernels(
    registry: AdapterRegistry,
    base: Leaves,
    updates: Mapping[str, Sequence[Update]],
    *,
    traced: bool = False,
) -> dict[Path, jax.Array]:
    """The kernels of the layers in `updates` with these merged in, each rounded once.

    Args:
      traced: inside ``jit``, where an array's own sharding cannot be seen: as it was when wrapped.

    Raises:
      ConfigError: a kernel takes none.
    """
    found = {}
    for name, mine in updates.items():
        layer = registry.layers[name]
        array = base[layer.kernel_path]
        if traced:
            kernel = Kernel.traced(array, layer.layout, layer.sharding, layer.packed)
        else:
            kernel = Kernel(array, layer.layout, packed=layer.packed)
        if kernel.refusal:
            way_out = (
                "a quantiser made them: merge_and_unload(dequantize=True) gives float kernels"
                if are_integers(layer.leaf)
                else "keep it beside, or load the base model unquantised and the adapter into that"
            )
            raise ConfigError(
                f"no adapter can be merged into {name!r}: {kernel.refusal}; {way_out}"
            )
        if traced:
            found[layer.kernel_path] = kernel.taking(mine)
        else:
            found[layer.kernel_path] = merged(array, mine, layer.layout, on_mesh(array))
    return found
