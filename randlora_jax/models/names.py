"""Names: where a leaf lives in a Flax model, and what PyTorch calls it.

Every module has one canonical name, its PyTorch module path; PEFT's target fields match it. Flax
and PyTorch twins share attribute names, so the default is the Flax path with dots.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.core.layers import Layer
from randlora_jax.interop.errors import TargetError

Path = tuple[Any, ...]
Array = np.ndarray
Rules = Mapping[str, str | Sequence[str]]

# Flax leaf -> PyTorch parameter. Only kernels change their layout.
TORCH_LEAF = {
    "kernel": "weight",
    "w": "weight",  # tunix
    "scale": "weight",
    "embedding": "weight",
    "input_embedding": "weight",  # tunix
    "weight": "weight",  # Equinox, in PyTorch's layout
    "bias": "bias",
    "b": "bias",  # Haiku
}


def dotted(path: Path) -> str:
    """The canonical name of a module at `path`."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Names:
    r"""Rules from the path of a JAX module to its canonical name, where the two differ.

    A rule's key is a regular expression that must match a whole path (``/`` between its parts);
    its value is the name, with ``\1`` for the expression's groups and ``{}`` for the index along
    each stack axis. A kernel that holds the matrices of several PyTorch modules takes a list of
    names, in the order of its last stack axis:

        {r"layers/(\d+)/attn/q_proj": r"model.layers.\1.self_attn.q_proj",
         r"blocks/mlp/up": "model.layers.{}.mlp.up_proj",
         r"layers/(\d+)/attn/kv": [r"model.layers.\1.self_attn.k_proj",
                                    r"model.layers.\1.self_attn.v_proj"]}
    """

    rules: Rules

    def of(self, path: Path, stack: tuple[int, ...] = ()) -> tuple[str, ...]:
        """Canonical names of the module at `path`: one for each matrix that a rule can name.

        Raises:
          TargetError: a rule names more or fewer matrices than the kernel holds.
        """
        joined = "/".join(map(str, path))
        for pattern, names in self.rules.items():
            match = re.fullmatch(pattern, joined)
            if not match:
                continue
            templates = [names] if isinstance(names, str) else list(names)
            expanded = [match.expand(template) for template in templates]
            outer = stack if isinstance(names, str) else stack[:-1]
            found = tuple(e.format(*i) for i in np.ndindex(*outer) for e in expanded)
            if len(set(found)) != math.prod(stack):
                raise TargetError(
                    f"names rule {pattern!r} gives {len(set(found))} different names to "
                    f"{joined!r}, whose kernel holds {math.prod(stack)} matrices {stack}: write "
                    "{} for each stack index, and a list for the last stack axis where it holds "
                    "different modules"
                )
            return found
        return (dotted(path),)

    def first(self, path: Path) -> str:
        """A canonical name of the module at `path`: the first where it stacks several."""
        joined = "/".join(map(str, path))
        for pattern, names in self.rules.items():
            match = re.fullmatch(pattern, joined)
            if match:
                template = names if isinstance(names, str) else names[0]
                return match.expand(template).replace("{}", "0")
        return dotted(path)


def torch_keys(path: Path, layer: Layer | None, names: Names) -> tuple[str, ...]:
    """The PyTorch state-dict keys of the leaf at `path`: one for each layer it stacks.

    Args:
      layer: the linear layer that owns the leaf, None for any other module.

    Raises:
      TargetError: PyTorch's name for such a leaf is unknown.
    """
    *module, leaf = path
    if leaf not in TORCH_LEAF and not (layer and leaf == layer.leaf):
        raise TargetError(
            f"parameter {dotted(path)!r} has no known PyTorch name: expected one of "
            f"{sorted(TORCH_LEAF)}; leave its module out of modules_to_save"
        )
    modules = layer.names if layer else names.of(tuple(module))
    return tuple(f"{name}.{TORCH_LEAF.get(leaf, 'weight')}" for name in modules)


def to_torch(value: jax.Array, path: Path, layer: Layer | None, names: Names) -> dict[str, Array]:
    """A Flax leaf by PyTorch key, in PyTorch's layout: kernels (out, in), a Conv1D's (in, out)."""
    keys = torch_keys(path, layer, names)
    if not _is_kernel(path, layer, value):
        if layer is None:
            return {keys[0]: np.asarray(value)}
        return dict(zip(keys, np.asarray(value).reshape(len(keys), -1), strict=True))
    known = _linear(layer, path)
    matrices = np.asarray(known.view.to_matrix(value)).reshape(len(keys), *known.matrix)
    if not known.fan_in_fan_out:
        matrices = matrices.swapaxes(1, 2)
    return {k: np.ascontiguousarray(m) for k, m in zip(keys, matrices, strict=True)}


def from_torch(arrays: list[Array], path: Path, layer: Layer | None, like: jax.Array) -> jax.Array:
    """The reverse of `to_torch`: PyTorch's parameters, in the order of their keys, as `like`.

    Raises:
      TargetError: the shapes do not fit.
    """
    if not _is_kernel(path, layer, like):
        expected = like.shape if layer is None else (like.size // len(arrays),)
    else:
        known = _linear(layer, path)
        expected = known.matrix if known.fan_in_fan_out else known.matrix[::-1]
    for value in arrays:
        if value.shape != expected:
            raise TargetError(
                f"{dotted(path)!r}: the file has shape {value.shape}, the model needs {expected} "
                "(in PyTorch's layout); load it into the model it was trained on"
            )
    stacked = jnp.asarray(np.stack(arrays))
    if not _is_kernel(path, layer, like):
        return stacked.reshape(like.shape)
    if not known.fan_in_fan_out:
        stacked = stacked.swapaxes(1, 2)
    return known.view.to_kernel(stacked.reshape(*known.stack, *known.matrix), like.shape)


def _is_kernel(path: Path, layer: Layer | None, value: jax.Array) -> bool:
    if layer:
        return path[-1] == layer.leaf
    return path[-1] in ("kernel", "w") and value.ndim > 1  # tunix names norms' scales w, too


def _linear(layer: Layer | None, path: Path) -> Layer:
    if layer is None:
        raise TargetError(
            f"{dotted(path)!r} is not the kernel of a linear layer, so its PyTorch layout is "
            "unknown; leave its module out of modules_to_save"
        )
    return layer
