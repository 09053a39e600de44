"""Finding layers: what of a model's modules is a linear layer, by its type or the user's word."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.mesh import on_mesh
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer import Layer, LayerType
from randlora_jax.models.names import Names, Path, dotted


@dataclass(frozen=True)
class StatedLayouts:
    """Layouts that a user states: regular expressions on a layer's path (``/`` between its parts).

    Raises:
      ConfigError: a stated layout is malformed.
    """

    rules: Mapping[str, str]

    def __post_init__(self) -> None:
        for rule, axes in self.rules.items():
            try:
                KernelLayout(axes)
            except ConfigError as error:
                raise ConfigError(f"views: {rule!r}: {error}") from None

    def find(self, path: Path) -> KernelLayout | None:
        """The first stated layout whose expression matches the whole path of a layer."""
        joined = "/".join(map(str, path))
        found = (axes for rule, axes in self.rules.items() if re.fullmatch(rule, joined))
        return next((KernelLayout(axes) for axes in found), None)


@dataclass(frozen=True)
class FoundModule:
    """A module that holds arrays: where it is, the arrays by name, and its type if it is known."""

    path: Path
    arrays: Mapping[str, Any]
    type: LayerType | None = None


@dataclass(frozen=True)
class FoundLayers:
    """Layers by their name, and the canonical names of all other modules that hold arrays."""

    layers: dict[str, Layer]
    modules: tuple[str, ...]


def find_layers(modules: Iterable[FoundModule], stated: StatedLayouts, names: Names) -> FoundLayers:
    """The layers among `modules`, each visited once.

    Raises:
      ConfigError: a stated layout fits none of its module's arrays.
      TargetError: a names rule does not fit a stack.
    """
    layers: dict[str, Layer] = {}
    others: set[str] = set()
    for module in modules:
        layer = _layer(module, stated.find(module.path), names)
        if layer:
            layers[layer.name] = layer
        elif module.arrays:
            others.add(names.first(module.path))
    return FoundLayers(layers, tuple(sorted(others)))


def _layer(module: FoundModule, stated: KernelLayout | None, names: Names) -> Layer | None:
    """None where no array is known to be a kernel.

    A type's layout lacks the axes along which scans and vmaps stack layers: they come first.
    """
    shapes = {name: x.shape for name, x in module.arrays.items()}
    if module.type is not None:
        leaf = module.type.leaf
    elif stated is not None:
        leaf = _leaf_of(module.path, stated, shapes)
    else:
        return None
    if leaf not in shapes:
        return None
    shape = shapes[leaf]
    if stated is not None:
        layout = stated
    else:
        assert module.type is not None
        axes = module.type.layout.axes
        layout = KernelLayout("s" * (len(shape) - len(axes)) + axes)
    return Layer(
        dotted(module.path),
        module.path,
        layout,
        shape,
        type=module.type,
        names=names.of(module.path, layout.sizes(shape)[0]),
        leaf=leaf,
        sharding=on_mesh(module.arrays[leaf]),
    )


def _leaf_of(path: Path, layout: KernelLayout, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The array of a layer of unknown type that a stated layout is about."""
    if "kernel" in shapes:
        return "kernel"
    fitting = [leaf for leaf, shape in shapes.items() if len(shape) == len(layout.axes)]
    if len(fitting) != 1:
        raise ConfigError(
            f"views: {layout.axes!r} is stated for {'/'.join(map(str, path))!r}, whose arrays are "
            f"{dict(shapes)}: expected one of {len(layout.axes)} axes, found {len(fitting)}. Name "
            "the kernel with layer_types={...: LayerType(layout, leaf=...)}"
        )
    return fitting[0]
