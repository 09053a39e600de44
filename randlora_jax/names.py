"""Names: where a leaf lives in a Flax model, and what PyTorch calls it.

Every module has one canonical name, its PyTorch module path; PEFT's target fields match it. Flax
and PyTorch twins share attribute names, so the default is the Flax path with dots.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.errors import TargetError
from randlora_jax.layers import Layer

Path = tuple[Any, ...]

# Flax leaf -> PyTorch parameter. Only kernels change their layout.
TORCH_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def dotted(path: Path) -> str:
    """The canonical name of a module at `path`."""
    return ".".join(map(str, path))


def torch_key(path: Path) -> str:
    """The PyTorch state-dict key of the leaf at `path`.

    Raises:
      TargetError: PyTorch's name for such a leaf is unknown.
    """
    *module, leaf = path
    if leaf not in TORCH_LEAF:
        raise TargetError(
            f"parameter {dotted(path)!r} has no known PyTorch name: expected one of "
            f"{sorted(TORCH_LEAF)}; leave its module out of modules_to_save"
        )
    return ".".join([*map(str, module), TORCH_LEAF[leaf]])


def to_torch(value: jax.Array, path: Path, layer: Layer | None) -> np.ndarray:
    """A Flax leaf in PyTorch's layout: kernels become (out, in), or (in, out) for a Conv1D.

    Args:
      layer: the linear layer that owns the leaf, None for any other module.
    """
    if path[-1] != "kernel":
        return np.asarray(value)
    known = _linear(layer, path)
    matrix = np.asarray(known.view.to_matrix(value))  # (in, out)
    return np.ascontiguousarray(matrix if known.fan_in_fan_out else matrix.T)


def from_torch(value: np.ndarray, path: Path, layer: Layer | None, like: jax.Array) -> jax.Array:
    """A PyTorch parameter in the layout of the Flax leaf `like`; the inverse of `to_torch`.

    Raises:
      TargetError: the shapes do not fit.
    """
    if path[-1] != "kernel":
        _check_shape(value, like.shape, path)
        return jnp.asarray(value)
    known = _linear(layer, path)
    n_in, n_out = known.matrix
    _check_shape(value, (n_in, n_out) if known.fan_in_fan_out else (n_out, n_in), path)
    return known.view.to_kernel(jnp.asarray(value if known.fan_in_fan_out else value.T), like.shape)


def _check_shape(value: np.ndarray, expected: tuple[int, ...], path: Path) -> None:
    if value.shape != expected:
        raise TargetError(
            f"{torch_key(path)!r}: the file has shape {value.shape}, the model's "
            f"{dotted(path)!r} needs {expected}; load it into the model it was trained on"
        )


def _linear(layer: Layer | None, path: Path) -> Layer:
    if layer is None or layer.stack:
        raise TargetError(
            f"{dotted(path)!r} is not the kernel of a linear layer, so its PyTorch layout is "
            "unknown; leave its module out of modules_to_save"
        )
    return layer
