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
    if leaf not in TORCH_LEAF and not (layer and path == layer.kernel_path):
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
        return dict(zip(keys, _stack_first(np.asarray(value), layer), strict=True))
    known = _linear(layer, path)
    matrices = np.asarray(known.layout.to_matrix(value)).reshape(len(keys), *known.matrix)
    if not known.fan_in_fan_out:
        matrices = matrices.swapaxes(1, 2)
    return {k: np.ascontiguousarray(m) for k, m in zip(keys, matrices, strict=True)}


def refuse_unwritable(path: Path, layer: Layer | None, names: Names, like: jax.Array) -> None:
    """Nothing, if `to_peft_layout` takes a leaf such as `like`.

    Raises:
      TargetError: PyTorch's name for it, or its layout there, is unknown.
    """
    torch_keys(path, layer, names)
    if _is_kernel(path, layer, like):
        _linear(layer, path)
    elif layer:
        _stack_axes(layer, like.shape)


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
        return stacked[0] if layer is None else _stack_back(stacked, layer, like)
    if not known.fan_in_fan_out:
        stacked = stacked.swapaxes(1, 2)
    return known.layout.to_kernel(stacked.reshape(*known.stack, *known.matrix), like.shape)


def _is_kernel(path: Path, layer: Layer | None, value: jax.Array) -> bool:
    if layer:
        return path == layer.kernel_path
    return path[-1] in ("kernel", "w") and value.ndim > 1  # tunix names norms' scales w, too


def _linear(layer: Layer | None, path: Path) -> Layer:
    if layer is None:
        raise TargetError(
            f"{dotted(path)!r} is not the kernel of a linear layer, so its PyTorch layout is "
            "unknown; leave its module out of modules_to_save"
        )
    return layer


def _stack_axes(layer: Layer, shape: tuple[int, ...]) -> list[int]:
    """Which axes of a leaf beside a kernel, such as a bias, are the kernel's stack axes.

    Those along which scans stack modules are the same axes of all their leaves; one that tells
    parts of a kernel apart comes before the leaf's out axes.

    Raises:
      TargetError: the extents do not tell.
    """
    axes, stack = layer.layout.axes, list(layer.stack)
    at = [i for i, axis in enumerate(axes) if axis == "s"]
    scanned = [min(i, len(shape) - len(at) + k) for k, i in enumerate(at)]
    parts = [i - axes[:i].count("i") for i in at]
    outs = [n for axis, n in zip(axes, layer.shape, strict=True) if axis == "o"]
    fitting = []
    for where in (parts, scanned):
        rest = [n for i, n in enumerate(shape) if i not in where]
        if [shape[i] for i in where] == stack and rest == outs and where not in fitting:
            fitting.append(where)
    if len(fitting) != 1:
        raise TargetError(
            f"a leaf of shape {shape} beside the kernel of {layer.name!r}, {layer.shape} as "
            f"{axes!r}: which of its axes are the stack's cannot be told; leave it out of "
            "modules_to_save and bias"
        )
    return fitting[0]


def _stack_first(value: np.ndarray, layer: Layer) -> np.ndarray:
    """A leaf beside a kernel as (matrices, ...), flat."""
    where = _stack_axes(layer, value.shape)
    return np.moveaxis(value, where, range(len(where))).reshape(len(layer.names), -1)


def _stack_back(stacked: jax.Array, layer: Layer, like: jax.Array) -> jax.Array:
    """The reverse of `_stack_first`."""
    where = _stack_axes(layer, like.shape)
    moved = np.moveaxis(np.empty(like.shape, np.bool_), where, range(len(where)))
    return jnp.moveaxis(stacked.reshape(moved.shape), range(len(where)), where)
