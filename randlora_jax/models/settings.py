"""What a checkpoint of adapter leaves keeps beside them, as JSON: else nobody knows what they mean.

Lambda and gamma of one shape fit models of any alpha and any bases, and are right in one.
"""

from collections.abc import Mapping
from typing import Any

from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError, listed, shown, warn
from randlora_jax.models.adapter_arrays import is_fresh
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import dotted
from randlora_jax.models.registry import AdapterRegistry, AdapterState

# Of the configuration, what decides what given leaves compute, apart from the layers it takes.
_DECIDING = ("r", "randlora_alpha", "projection_prng_key", "sparse", "very_sparse")


def settings_of(
    registry: AdapterRegistry, states: Mapping[str, AdapterState]
) -> dict[str, dict[str, Any]]:
    """By adapter: ``config`` as in its file, ``bases`` by their identity, ``layers`` by path, with
    the ``shape`` and ``axes`` of their kernels, ``trained_whole`` by path, with shapes; its
    ``scale``; whether it ``trains``, and whether it is ``merged`` into kernels, which may be saved
    beside its leaves.
    """
    return {
        name: {
            "config": _arguments(registry.configs[name]),
            "bases": str(registry.specs[name].identity),
            "layers": {n: _kernel(registry.layers[n]) for n in sorted(state.layers)},
            "trained_whole": {
                dotted(path): list(x.shape) for path, x in sorted(state.saved.items(), key=str)
            },
            "scale": registry.specs[name].scale,
            "trains": name in registry.active and name in registry.trained,
            "merged": name in registry.merged,
        }
        for name, state in states.items()
    }


def _kernel(layer: Layer) -> dict[str, Any]:
    """Its shape, and which of its axes are in, out, and stacked: a square one tells by no shape."""
    return {"shape": list(layer.shape), "axes": layer.layout.axes}


def _arguments(config: RandLoraConfig) -> dict[str, Any]:
    """Those that make the configuration again."""
    known = {k: v for k, v in config.to_dict().items() if k not in ("peft_type", *config.unknown)}
    return {**known, "projection_source": config.projection_source}


def refuse_others(ours: Mapping[str, Any], found: Any) -> None:
    """Nothing, if leaves saved beside the settings `found` mean the same where there are `ours`.

    Raises:
      ConfigError: they do not, or `found` are no settings.
    """
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(
            "settings: expected what model.randlora_settings() gave when the checkpoint was "
            f"saved, found {shown(found)}"
        )
    for name, theirs in found.items():
        if name not in ours:
            raise ConfigError(
                f"the checkpoint holds an adapter {shown(name)}, and this model has "
                f"{listed(sorted(ours)) or 'none'}: add it first, with the configuration that is "
                f"kept there, RandLoraConfig(**settings[{name!r}]['config'])"
            )
        _compare(name, ours[name], theirs)


def warn_of_idle(found: Mapping[str, Any], states: Mapping[str, AdapterState]) -> None:
    """Warn of adapters that what trained, kept beside the settings `found`, is without.

    Args:
      states: of this model's adapters; one that has numbers of its own lacks nothing.
    """
    idle = [name for name, theirs in found.items() if not theirs.get("trains", True)]
    if fresh := [name for name in idle if is_fresh(states[name])]:
        warn(
            f"{listed(fresh)}: did not train when the checkpoint was saved, so that what trained "
            "(nnx.state(model, AdapterParam), or split()'s trained leaves) is without it, and here "
            "its lambda is zero. Unless all of the model's state is restored, load it from a "
            "directory of its own (save_pretrained, load_adapter)"
        )


def _compare(name: str, ours: Mapping[str, Any], theirs: Any) -> None:
    parts = ("config", "bases", "layers", "trained_whole")
    whole = isinstance(theirs, Mapping) and all(part in theirs for part in parts)
    if not whole or not all(isinstance(theirs[p], Mapping) for p in parts if p != "bases"):
        raise ConfigError(
            f"settings of adapter {name!r}: expected {listed(parts)}, as "
            f"model.randlora_settings() gives them, found {shown(theirs)}"
        )
    for field in _DECIDING:
        _refuse(name, field, ours["config"].get(field), theirs["config"].get(field))
    _refuse(name, "the bases (projection_source)", ours["bases"], theirs["bases"])
    for field, part in (("target_modules", "layers"), ("modules_to_save", "trained_whole")):
        for path in sorted({*ours[part], *theirs[part]}):
            sides = [side[part].get(path) for side in (ours, theirs)]
            mine, kept = (
                f"no {path}" if x is None else f"{path} of shape {_shape(x)}" for x in sides
            )
            _refuse(name, f"what {field} takes", mine, kept)
            if all(isinstance(x, Mapping) for x in sides):
                axes = [x["axes"] for x in sides]
                _refuse(name, f"the axes of {path} (views)", *axes)
    if (scale := theirs.get("scale", 1.0)) != ours["scale"]:
        raise ConfigError(
            f"adapter {name!r}: the checkpoint was saved while its scale was {scale}, and here it "
            f"is {ours['scale']}: call set_scale({name!r}, {scale})"
        )
    _refuse_merged(name, ours["merged"], theirs.get("merged", False))  # which earlier ones lack


def _shape(kept: Any) -> tuple[int, ...]:
    """Of a kernel or another leaf; earlier settings have it alone of kernels, too."""
    return tuple(kept["shape"] if isinstance(kept, Mapping) else kept)


def _refuse(name: str, field: str, ours: Any, theirs: Any) -> None:
    """Nothing, if both sides are equal."""
    if ours != theirs:
        raise ConfigError(
            f"adapter {name!r}: {field}: the checkpoint was saved with {theirs}, and this model "
            f"has {ours}, so its leaves would mean something else here: wrap the model with the "
            f"configuration that is kept there, RandLoraConfig(**settings[{name!r}]['config']), "
            "and with the same views= and layer_types="
        )


def _refuse_merged(name: str, ours: bool, theirs: bool) -> None:
    """Nothing, if the kernels of both sides hold an adapter's delta, or those of none."""
    if theirs and not ours:
        raise ConfigError(
            f"adapter {name!r}: the checkpoint was saved while it was merged into the base model, "
            "and here it is not: with kernels restored from there its delta would be there twice. "
            f"Call merge_adapter([{name!r}]) first, and unmerge_adapter() once all is restored; "
            "where only leaves of the adapter are restored, too"
        )
    if ours and not theirs:
        raise ConfigError(
            f"adapter {name!r}: the checkpoint was saved while it was not merged, and here it is "
            "merged into the base model: with kernels restored from there its delta would be "
            f"lost. Call unmerge_adapter() first, and merge_adapter([{name!r}]) once all is "
            "restored; where only leaves of the adapter are restored, too"
        )
