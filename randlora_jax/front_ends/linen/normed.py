"""Layers whose kernel is normalised before it multiplies: ``nn.WeightNorm``, ``nn.SpectralNorm``.

Called, an adapter would be added to the normalised kernel; merged, to the one that is stored. The
two are different models, so such layers take none.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from randlora_jax.front_ends.linen.beside import layers_in
from randlora_jax.front_ends.params import flat
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.finding import multiplies_another
from randlora_jax.models.names import Path

NORMED = (nn.WeightNorm, nn.SpectralNorm)
MAPPED = "nn.map_variables around it may make another kernel of the one that is stored"


def normed_kernels(collections: Mapping[str, Any]) -> dict[Path, str]:
    """Kernels around which such a module has left its own variables; why they take no adapter.

    It names them by the kernel's path from the layer's parent: "dense/kernel/scale".
    """
    params = flat(collections.get("params", {}))
    found: dict[Path, str] = {}
    for name, collection in collections.items():
        kind = "WeightNorm" if name == "params" else "SpectralNorm"
        last = "scale" if name == "params" else "sigma"
        for *owner, key in flat(collection):
            *inner, end = str(key).split("/")
            if inner and end == last:
                for outer in (owner[:-1], owner):  # the layer is beside that module, or in it
                    path = (*outer, *inner)
                    if path in params:
                        found[path] = multiplies_another(f"a {kind}")
    return found


def refuse_normed(module: nn.Module) -> None:
    """Nothing, if `module`, which is about to run, normalises no adapted kernel.

    Raises:
      ConfigError: it does.
    """
    if isinstance(module, NORMED):
        params = module.layer_instance.variables.get("params", {})
        if names := dict(layers_in(params, deep=True)):
            kind = f"a {type(module).__name__}"
            raise ConfigError(
                f"{listed(names)}: {multiplies_another(kind)}, so called and merged would differ; "
                "leave it out of target_modules"
            )
