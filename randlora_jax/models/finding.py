"""Finding layers: which of a model's arrays are kernels, by a module's type or the user's word."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.mesh import on_mesh
from randlora_jax.core.update import holds_sums
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.idle_rules import refuse_idle, refuse_shadowed, refuse_unused_views
from randlora_jax.models.layer import Layer, LayerType
from randlora_jax.models.names import KERNEL_LEAVES, Names, Path, slashed
from randlora_jax.models.quantised import array_of, kernel_at


class Stated(NamedTuple):
    """A layout that a user states, and the rule that does."""

    rule: str
    layout: KernelLayout


@dataclass(frozen=True)
class StatedLayouts:
    """Layouts that a user states: regular expressions on paths (``/`` between their parts).

    Args:
      rules: an expression matches a layer's whole path, or that of an array.
      known: those that a known model's rules add, which need not match.

    Raises:
      ConfigError: a stated layout is malformed.
    """

    rules: Mapping[str, str]
    known: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for rule, axes in self.rules.items():
            try:
                KernelLayout(axes)
            except ConfigError as error:
                raise ConfigError(f"views: {rule!r}: {error}") from None

    def find(self, *paths: Path, unless: Path | None = None) -> Stated | None:
        """The first stated layout whose expression matches one of some whole paths.

        Args:
          unless: another path, which the expression must not match.
        """
        for rule, axes in self.rules.items():
            other = unless is not None and re.fullmatch(rule, slashed(unless))
            if any(re.fullmatch(rule, slashed(path)) for path in paths) and not other:
                return Stated(rule, KernelLayout(axes))
        return None


@dataclass(frozen=True)
class FoundModule:
    """A module that holds arrays.

    Args:
      path: where it is.
      arrays: what it holds itself, by where that is in it.
      kind: the name of its class; "" where it has none.
      type: what is known of its class as a layer.
      other: what it is known to be instead of a linear layer, such as "an embedding".
      refusals: why some of its arrays can take no adapter.
      inside: path of the module that it is a part of, where a framework within another is called
        as one.
      constants: floats that it holds itself and that its framework takes for no parameters.
    """

    path: Path
    arrays: Mapping[Path, Any]
    kind: str = ""
    type: LayerType | None = None
    other: str | None = None
    refusals: Mapping[Path, str] = field(default_factory=dict)
    inside: Path | None = None
    constants: Mapping[Path, Any] = field(default_factory=dict)

    @property
    def owner(self) -> Path:
        """Path of the module whose call uses the arrays."""
        return self.path if self.inside is None else self.inside

    @property
    def within(self) -> Path:
        """The module's path in its owner."""
        return self.path[len(self.owner) :]


@dataclass(frozen=True)
class LeftArray:
    """An array of two or more axes that no layer holds as its kernel.

    Args:
      path: where it lies.
      owner: path of the module that holds it.
      kind: the name of that module's class; "" where it has none.
      other: what it is known to be, such as "an embedding"; None where it may well be a kernel.
    """

    path: Path
    owner: Path
    shape: tuple[int, ...]
    kind: str
    other: str | None


@dataclass(frozen=True)
class FoundLayers:
    """What was found in a model.

    Args:
      layers: by their name.
      modules: canonical names of all other modules that hold arrays.
      left: arrays that look like kernels and are none of a layer's.
    """

    layers: dict[str, Layer]
    modules: tuple[str, ...]
    left: tuple[LeftArray, ...] = ()


def find_layers(modules: Iterable[FoundModule], stated: StatedLayouts, names: Names) -> FoundLayers:
    """The layers among `modules`, each visited once.

    Raises:
      ConfigError: a stated layout fits none of its module's arrays; a rule matches nothing; two
        paths are one with dots.
      TargetError: a names rule does not fit a stack.
    """
    layers: dict[str, Layer] = {}
    others: set[str] = set()
    left: list[LeftArray] = []
    paths: list[Path] = []
    holders: list[Path] = []
    for module in modules:
        mine = _layers_of(module, stated, names)
        for layer in mine:
            _refuse_another(layers.get(layer.name), layer)
            layers[layer.name] = layer
        if module.arrays and not any(layer.path == module.path for layer in mine):
            others.add(names.first(module.path))
        left += _left_of(module, {layer.kernel_path for layer in mine})
        arrays = [(*module.path, *leaf) for leaf in module.arrays]
        holders += [layer.path for layer in mine]
        holders += [path for leaf in arrays for path in (module.path, leaf[:-1])]
        paths += arrays
    said = {rule: axes for rule, axes in stated.rules.items() if rule not in stated.known}
    refuse_idle("views", said, [*holders, *paths])
    refuse_unused_views(said, layers.values())
    own_names = {rule: name for rule, name in names.rules.items() if rule not in names.known}
    refuse_idle("names", own_names, holders)
    refuse_shadowed("names", own_names, map(names.rules_of, dict.fromkeys(holders)))
    return FoundLayers(layers, tuple(sorted(others)), tuple(left))


def _refuse_another(found: Layer | None, layer: Layer) -> None:
    """Nothing, if no other kernel was found under a layer's name.

    Raises:
      ConfigError: there was one.
    """
    if found and found.kernel_path != layer.kernel_path:
        raise ConfigError(
            f"{slashed(found.kernel_path)!r} and {slashed(layer.kernel_path)!r} are kernels of two "
            f"layers that are both called {layer.name!r}: a path's parts are joined by dots, so "
            "hold them under keys that have none"
        )


def _layers_of(module: FoundModule, stated: StatedLayouts, names: Names) -> list[Layer]:
    """The layers whose kernels a module holds: by its type, or by rules on it or on its arrays."""
    whole = _whole_layer(module, stated)
    found = [_layer(module, whole, names, module.path)] if whole else []
    others = _stated_kernels(module, stated, whole)
    own = [kernel for kernel in others if slashed(array_of(kernel.leaf)) in KERNEL_LEAVES]
    for kernel in others:
        # the module of one such array is the layer, also to PyTorch; of several, each is a layer
        is_whole = not whole and module.path and own == [kernel]
        path = module.path if is_whole else (*module.path, *kernel.leaf)
        found.append(_layer(module, kernel, names, path))
    if not found:
        _refuse_misfits(module, stated)
    return found


class _Kernel(NamedTuple):
    """A kernel that a module holds: where, its layout, the rule of ``views=`` that states it."""

    leaf: Path
    layout: KernelLayout
    view: str | None


def _stated_kernels(
    module: FoundModule, stated: StatedLayouts, whole: _Kernel | None
) -> list[_Kernel]:
    """The kernels that rules on a module's arrays state, beside that of the `whole` module."""
    found = []
    for leaf, array in module.arrays.items():
        # a rule on the whole module is not about what lies beside its kernel
        said = stated.find((*module.path, *leaf), unless=module.path if whole else None)
        is_taken = whole and leaf == whole.leaf
        if said and not is_taken and len(said.layout.axes) == len(array.shape):
            found.append(_Kernel(leaf, said.layout, said.rule))
    return found


def _whole_layer(module: FoundModule, stated: StatedLayouts) -> _Kernel | None:
    """The kernel of a module that is one layer, by its type or by a rule on it.

    A type's layout lacks the axes along which scans and vmaps stack layers: they come first.
    """
    arrays = module.arrays
    if module.type is None:
        said = stated.find(module.path)
        leaf = _leaf_of(module, said.layout) if said else None
        said = stated.find(module.path, (*module.path, *leaf)) if leaf else None
        return _Kernel(leaf, said.layout, said.rule) if leaf and said else None
    kernel = kernel_at(tuple(module.type.leaf.split("/")), arrays)
    if kernel is None:
        return None
    axes = module.type.layout.axes
    stacks = "s" * (0 if module.type.shape else len(arrays[kernel].shape) - len(axes))
    said = stated.find(module.path, (*module.path, *kernel))
    return _Kernel(kernel, *(said[::-1] if said else (KernelLayout(stacks + axes), None)))


def _layer(module: FoundModule, kernel: _Kernel, names: Names, path: Path) -> Layer:
    leaf, layout, view = kernel
    array = module.arrays[leaf]
    known = module.type if path == module.path else None
    packed = known.shape if known else None
    shape = packed or tuple(array.shape)
    try:
        stack, _, _ = layout.sizes(shape)
    except ConfigError as error:
        raise ConfigError(f"layer {slashed(path)!r}, array {slashed(leaf)!r}: {error}") from None
    return Layer(
        path,
        layout,
        shape,
        module.owner,
        (*module.within, *leaf),
        type=known,
        names=names.of(path, stack),
        has_stated_names=names.has_rule(path, stack),
        sharding=on_mesh(array),
        refusal=module.refusals.get(leaf) or _no_way(array, known),
        view=view,
        stored=tuple(array.shape) if packed else None,
    )


def _no_way(array: Any, known: LayerType | None) -> str | None:
    """Why a layer could not run with an adapter; None where it can."""
    packed = bool(known and known.shape)
    if (holds_sums(array.dtype) and not packed) or (known and known.call):
        return None
    return (
        f"its kernel holds {array.dtype} numbers, which a float update cannot join, "
        "and what the layer computes is unknown: say it with layer_types={...: LayerType(layout, "
        "Contraction(equation))}"
    )


def _leaf_of(module: FoundModule, layout: KernelLayout) -> Path | None:
    """The array of a layer of unknown type that a layout stated for it is about, if it is one."""
    if kernel := kernel_at(("kernel",), module.arrays):
        return kernel
    shapes = {leaf: x.shape for leaf, x in module.arrays.items()}
    fitting = [leaf for leaf, shape in shapes.items() if len(shape) == len(layout.axes)]
    return fitting[0] if len(fitting) == 1 else None


def _refuse_misfits(module: FoundModule, stated: StatedLayouts) -> None:
    """Nothing, if no rule is about this module, which has no layer.

    Raises:
      ConfigError: one is.
    """
    paths = [module.path, *((*module.path, *leaf) for leaf in module.arrays)]
    for path in paths if module.arrays else ():
        said = stated.find(path)
        if said is not None:
            axes = said.layout.axes
            shapes = {slashed(leaf): tuple(x.shape) for leaf, x in module.arrays.items()}
            fitting = sum(len(shape) == len(axes) for shape in shapes.values())
            raise ConfigError(
                f"views: {axes!r} is stated for {slashed(path)!r}, whose arrays are "
                f"{shapes}: expected one of {len(axes)} axes, found {fitting}. State the "
                "whole path of the array meant, or name it with layer_types={...: "
                "LayerType(layout, leaf=...)}"
            )


def multiplies_another(what: str) -> str:
    """Why a kernel in `what`, which normalises it first, takes no adapter."""
    return f"{what} multiplies by another kernel than the one that is stored"


# Names of arrays, and of modules, that are no linear layers, where no type tells.
_OTHER = {
    "an embedding": re.compile(r"(?i)emb|vocab|wte|wpe|(^|_)pos|position"),
    "a norm": re.compile(r"(?i)norm|(^|_)ln"),
    "a scale": re.compile(r"(?i)scale"),
    "a convolution": re.compile(r"(?i)conv"),
    "a bias": re.compile(r"(?i)bias|^b$"),
}


def _may_be_kernel(leaf: Path, shape: tuple[int, ...]) -> bool:
    """Whether an array may be a kernel by its shape; a vector, or a scalar, is none.

    A column may be that of one output, and so may a row that is called a kernel; other rows are
    tokens and gains.
    """
    wide = sum(extent != 1 for extent in shape)
    if len(shape) != 2 or wide != 1:
        return wide > 1
    return shape[1] == 1 or slashed(array_of(leaf)) in KERNEL_LEAVES


def _left_of(module: FoundModule, taken: set[Path]) -> list[LeftArray]:
    left = []
    for leaf, array in module.arrays.items():
        path, shape = (*module.path, *leaf), tuple(array.shape)
        if path in taken or not _may_be_kernel(leaf, shape):
            continue
        words = (str(leaf[-1]), module.kind, str(module.path[-1]) if module.path else "")
        guesses = (what for what, about in _OTHER.items() if any(map(about.search, words)))
        other = module.other or next(guesses, None)
        left.append(LeftArray(path, module.path, shape, module.kind, other))
    for leaf, array in module.constants.items():
        path, shape = (*module.path, *leaf), tuple(array.shape)
        if _may_be_kernel(leaf, shape):
            left.append(LeftArray(path, module.path, shape, module.kind, "no parameter"))
    return left
