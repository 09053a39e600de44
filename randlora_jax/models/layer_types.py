"""Types of layers: where each keeps its kernel and how that forms matrices.

Every front end has a table of the types it knows; ``get_peft_model(layer_types=...)`` adds a
user's own:

    class MyDense(nnx.Module):          # y = x @ self.weights
        ...

    get_peft_model(model, config, layer_types={MyDense: LayerType(View("i o"), leaf="weights")})
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from randlora_jax.core.contraction import LAST_AXES, Contraction
from randlora_jax.core.kernel_layout import View
from randlora_jax.core.layers import Layer
from randlora_jax.core.mesh import on_mesh
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.names import Names, Path, dotted


@dataclass(frozen=True)
class LayerType:
    """What is known of a type of layer.

    Args:
      view: of its kernel, without the axes along which scans stack layers.
      call: what it computes, without its bias; None where that is no sum over axes of its input:
        then adapters can only run merged.
      fan_in_fan_out: its PyTorch twin is a Conv1D, which holds (in, out).
      leaf: the kernel's name in the layer.
    """

    view: View
    call: Contraction | None = LAST_AXES
    fan_in_fan_out: bool = False
    leaf: str = "kernel"


# A type, or its full name where importing it is not ours to do; what it is, or how to tell.
Table = Mapping[type | str, LayerType | Callable[[Any], LayerType | None]]


@dataclass(frozen=True, eq=False)
class LayerTypes:
    """Tables to look a layer up in, the first one first."""

    tables: tuple[Table, ...]

    def find(self, module: Any) -> LayerType | None:
        """What is known of a layer's type, or of the nearest type it derives from."""
        for kind in type(module).__mro__:
            for table in self.tables:
                known = table.get(kind) or table.get(f"{kind.__module__}.{kind.__qualname__}")
                if known is not None:
                    return known(module) if callable(known) else known
        return None


def of_axes(n_in: int, n_out: int, axes: tuple[int, ...], batch: int = 0) -> LayerType:
    """A layer that sums over `axes` of its input, with `batch` leading kernel axes for as many.

    The kernel has n_in axes for the input, in the order of `axes`, then n_out for the output.
    """
    view = View("s" * batch + "i" * n_in + "o" * n_out)
    if not batch and axes == tuple(range(-n_in, 0)):
        return LayerType(view)
    if min(axes) < 0 <= max(axes):
        return LayerType(view, None)  # which axes of the input they are, its rank decides
    kernel, spare = string.ascii_lowercase[: len(view.axes)], string.ascii_uppercase
    named = dict(enumerate(kernel[:batch])) | dict(zip(axes, kernel[batch:], strict=False))
    left = "".join(named.get(i, spare[i]) for i in range(max(named) + 1))
    right = "".join(named.get(i, spare[i]) for i in range(min(named), 0))
    x = f"{left}...{right}"
    rows = "".join(c for c in x if c not in kernel)
    out = kernel[:batch] + rows + kernel[batch + n_in :]
    return LayerType(view, Contraction(f"{x},{kernel}->{out}"))


def of_einsum(equation: str, leaf: str = "kernel") -> LayerType:
    """A layer that computes ``einsum(equation, x, kernel)``.

    A letter of the kernel is "in" where the sum runs over it, "out" where only the result has it
    besides, and stacks matrices where x has it, too. (Some kernels hold several PyTorch layers
    along what looks like an out axis: state a view with ``s`` there.)

    Raises:
      ConfigError: a letter of the kernel is in neither x nor the result.
    """
    x, _, rest = equation.replace(" ", "").partition(",")
    kernel, _, out = rest.partition("->")
    kinds = {(True, False): "i", (False, True): "o", (True, True): "s"}
    try:
        axes = "".join(kinds[letter in x, letter in out] for letter in kernel)
    except KeyError:
        raise ConfigError(
            f"einsum {equation!r} sums over an axis that its kernel alone has: such a layer "
            "cannot be adapted; leave it out of target_modules"
        ) from None
    # what else it sums over would have to be summed beside, too
    call = Contraction(equation) if set(x) - set(kernel) <= set(out) else None
    return LayerType(View(axes), call, leaf=leaf)


def layer_at(
    path: Path,
    arrays: Mapping[str, Any],
    known: LayerType | None,
    stated: View | None,
    names: Names,
) -> Layer | None:
    """The layer at `path`, None where no array is known to be a kernel.

    Args:
      arrays: that it owns, or their shapes and dtypes.
      known: its type, if a table has it.
      stated: the user's word for its kernel's layout; else surplus leading axes stack layers, as
        scans and vmaps leave them.

    Raises:
      ConfigError: `stated` is about none of the arrays.
    """
    shapes = {name: x.shape for name, x in arrays.items()}
    leaf = known.leaf if known else _leaf_of(path, stated, shapes) if stated else None
    view = stated or (known.view if known else None)
    if leaf not in shapes or leaf is None or view is None:
        return None
    shape = shapes[leaf]
    if not stated:
        view = View("s" * (len(shape) - len(view.axes)) + view.axes)
    return Layer(
        dotted(path),
        path,
        view,
        shape,
        fan_in_fan_out=known is not None and known.fan_in_fan_out,
        stated=stated is not None,
        names=names.of(path, view.sizes(shape)[0]),
        leaf=leaf,
        sharding=on_mesh(arrays[leaf]),
    )


def _leaf_of(path: Path, view: View, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The array of a layer of unknown type that a stated view is about."""
    if "kernel" in shapes:
        return "kernel"
    fitting = [leaf for leaf, shape in shapes.items() if len(shape) == len(view.axes)]
    if len(fitting) != 1:
        raise ConfigError(
            f"views: {view.axes!r} is stated for {'/'.join(map(str, path))!r}, whose arrays are "
            f"{dict(shapes)}: expected one of {len(view.axes)} axes, found {len(fitting)}. Name "
            "the kernel with layer_types={...: LayerType(view, leaf=...)}"
        )
    return fitting[0]


def running_type(layer: Layer, ndim: int, known: LayerType | None, kind: str) -> LayerType:
    """The type of a running layer whose kernel has `ndim` axes; `known` of its class `kind`.

    Raises:
      ConfigError: the type is unknown and the user stated no view, or the two disagree.
    """
    view = layer.view.within(ndim)
    if known is None:
        if layer.stated:
            return LayerType(view, call=None, leaf=layer.leaf)
        raise ConfigError(
            f"layer {layer.name!r} is a {kind}, whose kernel layout is unknown: state it, such as "
            f"views={{{layer.name.replace('.', '/')!r}: 'i o'}}, or leave it out of target_modules"
        )
    if not view.splits(known.view):
        raise ConfigError(
            f"layer {layer.name!r} was taken for {view.axes!r}, but a {kind} holds its kernel as "
            f"{known.view.axes!r}; state views={{...}} accordingly"
        )
    return replace(known, view=view)
