"""Leaves of a model in PyTorch's names and layouts, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax.interop.errors import TargetError
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import TORCH_LEAF, Names, Path, dotted


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


def to_peft_layout(
    value: jax.Array, path: Path, layer: Layer | None, names: Names
) -> dict[str, np.ndarray]:
    """A Flax leaf by PyTorch key, in PyTorch's layout: kernels (out, in), a Conv1D's (in, out)."""
    keys = torch_keys(path, layer, names)
    if not _is_kernel(path, layer, value):
        if layer is None:
            return {keys[0]: np.asarray(value)}
        return dict(zip(keys, np.asarray(value).reshape(len(keys), -1), strict=True))
    known = _linear(layer, path)
    matrices = np.asarray(known.layout.to_matrix(value)).reshape(len(keys), *known.matrix)
    if not known.fan_in_fan_out:
        matrices = matrices.swapaxes(1, 2)
    return {k: np.ascontiguousarray(m) for k, m in zip(keys, matrices, strict=True)}


def from_peft_layout(
    arrays: list[np.ndarray], path: Path, layer: Layer | None, like: jax.Array
) -> jax.Array:
    """The reverse of `to_peft_layout`: PyTorch's parameters, in the order of their keys, as `like`.

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
    return known.layout.to_kernel(stacked.reshape(*known.stack, *known.matrix), like.shape)


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
