"""Between a model's adapter and its PEFT directory: names, layouts, whose the bases are."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from randlora_jax.core.bases import used_extents
from randlora_jax.core.update import at_least_float32, holds_sums
from randlora_jax.interop import promises, targets
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import (
    AdapterFileError,
    RandLoraError,
    TargetError,
    nearest,
    shown,
    warn,
)
from randlora_jax.interop.peft_dir import read_files
from randlora_jax.interop.promises import BaseNames
from randlora_jax.models import adapter_arrays, basis_source, saved_whole, selecting
from randlora_jax.models.basis_source import KeptPairs
from randlora_jax.models.finding import LeftArray
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, by_default, slashed
from randlora_jax.models.peft_layout import torch_keys
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec, AdapterState


class Restored(NamedTuple):
    """An adapter that was read and fits a model.

    kept: what of its bases cannot be redrawn.
    carried: as `AdapterRegistry.carried`.
    """

    spec: AdapterSpec
    config: RandLoraConfig
    state: AdapterState
    kept: KeptPairs
    carried: frozenset[Path] = frozenset()


def with_carried(
    registry: AdapterRegistry,
    base: Mapping[Path, jax.Array],
    adapter_name: str,
    state: AdapterState,
) -> AdapterState:
    """`state` with all that its file carried: the model's own numbers, where these were the same.

    Who opens the file in PyTorch may have resized the vocabulary anew, at random.
    """

    def own(path: Path) -> jax.Array:
        now, before = base[path], registry.originals.get(path)
        leaf = before.put_back(now) if before else now
        return leaf.astype(at_least_float32(leaf.dtype))

    lacking = registry.carried[adapter_name] - state.saved.keys()
    return dataclasses.replace(state, saved=state.saved | {path: own(path) for path in lacking})


def export(registry: AdapterRegistry, adapter_name: str, state: AdapterState) -> Adapter:
    """An adapter in PEFT's names and layouts, in host memory.

    Raises:
      TargetError: a leaf has no PyTorch name.
    """
    spec = registry.specs[adapter_name]
    layers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    owners: dict[str, Layer] = {}
    rounded = False
    for name, leaves in state.layers.items():
        held = [np.asarray(leaf) for leaf in leaves]
        lam, gamma = (leaf.astype(np.float32) for leaf in held)  # 16 bits: exactly
        rounded |= any((mine != leaf).any() for mine, leaf in zip((lam, gamma), held, strict=True))
        layer = registry.layers[name]
        gammas = layer.split(gamma)
        layers |= {k: (lam, gammas[k]) for k, lam in layer.split(lam).items()}
        owners |= dict.fromkeys(layer.names, layer)
    if rounded:
        warn(
            f"adapter {adapter_name!r}: its lambda or gamma is float64, and a file holds them in "
            "float32, which is what they are computed with: they are rounded"
        )
    bases = basis_source.stored_pair(spec.identity, spec.extents, registry.kept_pairs)
    saved = saved_whole.tensors_of(registry, state)
    whole = saved_whole.keys_of(registry, registry.trained_part(adapter_name, state))
    return Adapter(
        config=_written_config(registry, adapter_name, owners, whole),
        layers=layers,
        saved=saved,
        bases=bases,
        provenance=Provenance(
            source=spec.identity.source,
            projection_prng_key=spec.identity.key,
            kind=spec.identity.kind,
            digest=bases_digest(*bases),
            shapes={
                name: (out, in_) for name, layer in owners.items() for in_, out in [layer.matrix]
            },
        ),
    )


def _written_config(
    registry: AdapterRegistry,
    adapter_name: str,
    owners: Mapping[str, Layer],
    saved: Collection[str],
) -> RandLoraConfig:
    """What PEFT's file says of an adapter whose layers have the canonical names of `owners`.

    Args:
      saved: keys of what was trained whole.
    """
    config, info = registry.configs[adapter_name], registry.info
    whole = saved_whole.modules_of(registry, config, saved)
    base = config.base_model_name_or_path or info.name_or_path
    if info.model_type and not base:
        warn(
            "base_model_name_or_path is unknown, so PEFT's Auto classes will not find the base "
            "model of this adapter; give it in RandLoraConfig"
        )
    return dataclasses.replace(
        config,
        target_modules=targets.write_targets(owners, [*registry.modules, *registry.owners()]),
        layers_to_transform=None,  # target_modules says all
        layers_pattern=None,
        modules_to_save=whole or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in owners.values()),
        base_model_name_or_path=base,
        auto_mapping=config.auto_mapping or (None if config.task_type else info.auto_mapping),
        inference_mode=True,
    )


def warn_of_own_names(registry: AdapterRegistry, states: Mapping[str, AdapterState]) -> None:
    """Warn where files name layers as the JAX model does, for want of PyTorch's names."""
    if registry.info.has_torch_paths:
        return
    adapted = {name for state in states.values() for name in state.layers}
    own = [n for n in adapted if not registry.layers[n].has_stated_names]
    if own:
        first = registry.layers[min(own)]
        blank = "...".join(["", *["{}"] * len(first.stack), ""])
        here = {slashed(first.path): by_default(first.path, ["{}"] * len(first.stack))}
        same = here if first.stack else r"{'.*': r'\g<0>'}"
        what = f"{len(own)} adapted layers are saved by their paths"
        if len(own) == 1:
            what = "1 adapted layer is saved by its path"
        warn(
            f"{what} in the JAX model, such as "
            f"{first.names[0]!r}. PEFT finds them only in a PyTorch model that has these very "
            "names, and else hardly says so. Say what they are called there: "
            f"save_pretrained(..., names={{{slashed(first.path)!r}: {blank!r}}}), or names= when "
            f"wrapping; names={same} says that they are the same"
        )


def warn_if_apart(adapters: Mapping[str, Adapter]) -> None:
    """Warn where PEFT refuses to open these adapters in one model, or would mix them up."""
    first, *others = adapters
    bases = {name: a.provenance.digest for name, a in adapters.items() if a.provenance}
    other = [name for name in others if bases[name] != bases[first]]
    biased = [name for name, adapter in adapters.items() if adapter.config.bias != "none"]
    reason = ""
    if other:
        reason = f"{other} have other bases than {first!r}: other targets, rank or kind"
    elif len(biased) > 1:
        reason = f"{biased} all train biases"
    if reason:
        warn(f"PEFT cannot open these adapters in one PyTorch model, only one at a time: {reason}")


def restore(
    registry: AdapterRegistry,
    base: Mapping[Path, jax.Array],
    directory: str | FilePath,
    adapter_name: str,
    torch_generation: str | None,
    base_dtype: npt.DTypeLike | None,
) -> Restored:
    """Reads an adapter directory and fits it to a model; changes nothing.

    Raises:
      AdapterFileError: the files are damaged, or hold other tensors than their config asks for.
      ConfigError: as `basis_source.of_adapter` and `basis_source.scaling`.
      TargetError: the adapter's layers and the model's do not fit together.
    """
    with _about(directory):
        adapter = read_files(directory)
        owners = registry.owners()
        _check_sizes(owners, registry.left, adapter, directory)
        adapter = promises.check(adapter, directory, _names(registry, base, adapter))
        _check_selected(registry, adapter, directory)
        chosen = {name: owners[name] for name in adapter.layers}
        extents = basis_source.pair_extents(
            [layer.matrix for layer in chosen.values()], adapter.config.r
        )
        if adapter.bases is not None:
            a, b = adapter.bases
            if (b.shape[0], a.shape[2]) != (extents.max, extents.min):
                raise TargetError(
                    f"{directory} has bases for extents {(b.shape[0], a.shape[2])}; its layers "
                    f"need {(extents.max, extents.min)} in this model, and PEFT would refuse "
                    "anything else: it was trained on another model"
                )
        dtypes = {kernel_dtype(base, layer) for layer in chosen.values()}
        identity, kept, config = basis_source.of_adapter(
            adapter, extents, dtypes, torch_generation, base_dtype, directory
        )
        scaling = basis_source.scaling(config, identity, kept)
        spec = AdapterSpec(adapter_name, scaling, config.randlora_dropout, identity, extents)
        lams = {name: lam for name, (lam, _) in adapter.layers.items()}
        gammas = {name: gamma for name, (_, gamma) in adapter.layers.items()}
        layers = {
            layer.name: (jnp.asarray(layer.join(lams)), jnp.asarray(layer.join(gammas)))
            for layer in chosen.values()
        }
        saved = saved_whole.leaves_of(registry, base, adapter, directory)
        asked = adapter_arrays.whole_paths(registry, base, config, layers)
        carried = frozenset(saved.keys() - set(asked))
        saved = saved_whole.less_the_bases(saved, base, carried)
        return Restored(spec, config, AdapterState(layers, saved), kept, carried)


@contextmanager
def _about(directory: str | FilePath) -> Iterator[None]:
    """Errors within say which directory they are about."""
    try:
        yield
    except RandLoraError as error:
        if str(directory) in str(error):
            raise
        raise type(error)(f"{directory}: {error}") from error


def kernel_dtype(base: Mapping[Path, jax.Array], layer: Layer) -> np.dtype:
    """The dtype of a layer's kernel, to which PEFT casts PyTorch's bases; float32 if quantised."""
    dtype = base[layer.kernel_path].dtype
    return np.dtype(dtype if holds_sums(dtype) else np.float32)


def _names(
    registry: AdapterRegistry, base: Mapping[Path, jax.Array], adapter: Adapter
) -> BaseNames:
    """What the model has of all that the adapter's config can speak of."""
    layers = registry.owners()
    adapted = {layers[name].name for name in adapter.layers}
    tensors: set[str] = set()
    for path in adapter_arrays.whole_paths(registry, base, adapter.config, adapted):
        with suppress(TargetError):  # what has no name in PyTorch is in no file
            tensors |= set(torch_keys(path, registry.layer_of(path), registry.names))
    return BaseNames(tensors, layers, is_whole=True)


def _check_sizes(
    owners: Mapping[str, Layer],
    left: Iterable[LeftArray],
    adapter: Adapter,
    directory: str | FilePath,
) -> None:
    """The file's layers are the model's, of the right sizes.

    Args:
      left: the arrays that no layer of the model holds.
    """
    for name, (lam, gamma) in adapter.layers.items():
        if name not in owners:
            raise TargetError(
                f"{directory} adapts layer {shown(name)}, which this model does not have as a "
                f"linear layer; it has {nearest(name, list(owners))}. {_to_give(name, left)}"
            )
        matrix = owners[name].matrix
        _, n, smallest = used_extents(matrix, adapter.config.r)
        if lam.shape != (adapter.config.r, n) or gamma.shape != (n, smallest):
            raise TargetError(
                f"{directory}: layer {shown(name)} has lambda {lam.shape} and gamma {gamma.shape}; "
                f"this model's (in, out) = {matrix} needs {(adapter.config.r, n)} and "
                f"{(n, smallest)}: it was trained on another model"
            )


_LINEN = " (in linen, sample_inputs= too, without which no module tells its type)"


def _to_give(name: str, left: Iterable[LeftArray]) -> str:
    """What to do about a layer that the model lacks; and the array in its place, if any."""

    def bare(parts: Iterable[Any]) -> list[str]:
        return [str(part) for part in parts if not str(part).isdigit()]  # stacked, or one by one

    for array in left:
        if bare(name.split(".")) in (bare(array.owner), bare(array.path)):
            return (
                f"It has an array {slashed(array.path)!r} there: give the layer_types= or views= "
                f"that the adapter was made with{_LINEN}"
            )
    return (
        f"Give the names=, layer_types= and views= that the adapter was made with, if any{_LINEN}"
    )


def _check_selected(registry: AdapterRegistry, adapter: Adapter, directory: str | FilePath) -> None:
    """The file's layers are what its config selects by the rules of the model's type."""
    chosen = selecting.select(registry, adapter.config)
    if set(chosen) != set(adapter.layers):
        missing, extra = set(chosen) - set(adapter.layers), set(adapter.layers) - set(chosen)
        raise AdapterFileError(
            f"{directory}: target_modules={shown(adapter.config.target_modules)} and the tensors "
            f"of the file disagree; layers without tensors: {shown(sorted(missing))}, tensors "
            f"without a layer: {shown(sorted(extra))}"
        )
