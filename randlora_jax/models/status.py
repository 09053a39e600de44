"""The state of a wrapped model, layer by layer: PEFT's ``get_layer_status``, ``get_model_status``.

The fields are PEFT's, by name and meaning (``peft.peft_model.TunerLayerStatus`` and
``TunerModelStatus``, 0.21). Two things differ. A device is JAX's word for it: "cpu", "gpu", "tpu".
And nothing but `quantization_backend` is ever "irregular": all layers of a model here follow one
registry. (PEFT says so of sound models, whose modules trained whole never merge.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from randlora_jax.core.update import holds_sums
from randlora_jax.interop import targets
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path
from randlora_jax.models.quantised import are_integers
from randlora_jax.models.registry import AdapterRegistry, AdapterState


@dataclass(frozen=True)
class TunerLayerStatus:
    """Of one matrix that adapters adapt, or of one module that they train whole.

    Args:
      name: as PEFT has it: "model." and the canonical name.
      module_type: "randlora.Linear" or "ModulesToSaveWrapper".
      enabled: adapters are not off.
      active_adapters: that are applied; of a module trained whole, as far as they trained it.
      merged_adapters: whose deltas are in the kernel.
      requires_grad: by adapter, whether an optimizer moves its numbers here.
      available_adapters: that have something here, sorted.
      devices: by adapter, where its numbers are.
      quantization_backend: "qwix" where qwix quantised the kernel; "other" where it holds integers,
        or floats of 8 bits or fewer, of anyone else's making; else None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class TunerModelStatus:
    """Of a whole model; fields that `TunerLayerStatus` has too are those of its layers together.

    Args:
      base_model_type: class of the base model.
      peft_types: of each adapter.
      trainable_params, total_params: as `get_nb_trainable_parameters`.
      num_adapter_layers: how many `TunerLayerStatus` there are.
      quantization_backend: "irregular" where some kernels are quantised.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def layer_status(
    registry: AdapterRegistry, base: Mapping[Path, Any], states: Mapping[str, AdapterState]
) -> list[TunerLayerStatus]:
    """Of every matrix and module that some adapter has something of, in the model's order.

    Raises:
      ConfigError: there is none.
    """
    adapted: dict[str, dict[str, list[Any]]] = {}  # by canonical name and adapter, its arrays
    whole: dict[str, dict[str, list[Any]]] = {}
    for name, layer in registry.owners().items():
        held = {a: list(s.layers[layer.name]) for a, s in states.items() if layer.name in s.layers}
        adapted |= {name: held} if held else {}
    for adapter, state in states.items():
        for path, leaf in state.saved.items():
            if module := _saved_module(registry, adapter, path):
                whole.setdefault(module, {}).setdefault(adapter, []).append(leaf)
    if not adapted:
        raise ConfigError("this model has no adapter, so no layer has a status: add one first")
    owners = registry.owners()
    backends = {n: _backend(owners[n], base[owners[n].kernel_path]) for n in adapted}
    return [
        *(_status(registry, n, held, backends[n], matrix=True) for n, held in adapted.items()),
        *(_status(registry, n, held, None, matrix=False) for n, held in whole.items()),
    ]


def model_status(
    registry: AdapterRegistry,
    base_name: str,
    count: tuple[int, int],
    layers: list[TunerLayerStatus],
) -> TunerModelStatus:
    """Of a model whose layers have the status `layers`.

    Args:
      count: of trained numbers, and of all.
    """
    names = sorted(registry.specs)
    backends = {layer.quantization_backend for layer in layers if layer.module_type == _MATRIX}
    return TunerModelStatus(
        base_model_type=base_name,
        adapter_model_type="RandLoraModel",
        peft_types=dict.fromkeys(registry.specs, "RANDLORA"),
        trainable_params=count[0],
        total_params=count[1],
        num_adapter_layers=len(layers),
        enabled=registry.enabled,
        active_adapters=list(registry.active),
        merged_adapters=sorted(registry.merged),
        requires_grad={name: _trains(registry, name) for name in registry.specs},
        available_adapters=names,
        devices={
            name: sorted({d for layer in layers for d in layer.devices.get(name, ())})
            for name in registry.specs
        },
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


_MATRIX = "randlora.Linear"


def _status(
    registry: AdapterRegistry,
    name: str,
    held: Mapping[str, list[Any]],
    backend: str | None,
    *,
    matrix: bool,
) -> TunerLayerStatus:
    """Of the matrix or module `name`, of which adapters have the arrays in `held`."""
    return TunerLayerStatus(
        name=f"model.{name}",
        module_type=_MATRIX if matrix else "ModulesToSaveWrapper",
        enabled=registry.enabled,
        active_adapters=[a for a in registry.active if matrix or a in held],
        merged_adapters=[a for a in registry.merged if matrix and a in held],
        requires_grad={adapter: _trains(registry, adapter) for adapter in held},
        available_adapters=sorted(held),
        devices={adapter: _devices(arrays) for adapter, arrays in held.items()},
        quantization_backend=backend,
    )


def _trains(registry: AdapterRegistry, adapter_name: str) -> bool:
    return registry.enabled and adapter_name in registry.training


def _devices(arrays: Iterable[Any]) -> list[str]:
    """The kinds of device that hold some arrays; none for shapes alone."""
    held = [x for x in arrays if isinstance(x, jax.Array)]
    return sorted({device.platform for x in held for device in x.devices()})


def _backend(layer: Layer, kernel: Any) -> str | None:
    if are_integers(layer.leaf):
        return "qwix"
    return None if holds_sums(kernel.dtype) else "other"


def _saved_module(registry: AdapterRegistry, adapter_name: str, path: Path) -> str | None:
    """The module trained whole that the leaf at `path` is of; None for a bias by itself."""
    patterns = targets.saved_modules(registry.configs[adapter_name])
    parts = registry.names.first(path[:-1]).split(".")
    around = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return next((name for name in around if targets.matches_saved(name, patterns)), None)
