"""A layer an adapter can take: where its kernel is, what is known of its type, its names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from randlora_jax.core.contraction import LAST_AXES, Contraction
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.interop.errors import ConfigError, TargetError, listed, shown
from randlora_jax.interop.targets import inside_saved
from randlora_jax.models.names import Path


@dataclass(frozen=True)
class LayerType:
    """What is known of a type of layer.

    Args:
      layout: of its kernel, without the axes along which scans stack layers (or with, as ``s``).
      call: what it computes in one step of a scan, without its bias; None where that is no sum over
        axes of its input: then adapters can only run with delta in the kernel.
      fan_in_fan_out: its PyTorch twin is a Conv1D, which holds (in, out).
      leaf: the kernel's name in the layer.
      shape: of the kernel, where `leaf` holds its numbers packed, in an array of another shape;
        None where it is the array's. Delta then runs beside, and `call` is needed. Where layers are
        stacked, the first axes of shape, layout and array are those that stack them.

    Raises:
      ConfigError: one of them is something else, or the call's kernel or `shape` has another number
        of axes than the layout, but for stack axes.
    """

    layout: KernelLayout
    call: Contraction | None = LAST_AXES
    fan_in_fan_out: bool = False
    leaf: str = "kernel"
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, kinds, expected in (
            ("layout", KernelLayout, "a KernelLayout, such as KernelLayout('i o')"),
            ("call", Contraction | None, "a Contraction or None"),
            ("fan_in_fan_out", bool, "True or False"),
            ("leaf", str, "the name of an array, such as 'kernel'"),
        ):
            if not isinstance(found := getattr(self, name), kinds):
                raise ConfigError(f"LayerType: {name}: expected {expected}, found {shown(found)}")
        if self.call and self.call.equation:
            self._check_call(self.call)
        if self.shape is not None:
            self._check_shape(self.shape)

    def _check_shape(self, shape: Any) -> None:
        """It has an extent for each axis of the layout."""
        axes = self.layout.axes
        counted = isinstance(shape, tuple) and all(isinstance(n, int) and n > 0 for n in shape)
        if not counted or len(shape) != len(axes):
            raise ConfigError(
                f"LayerType: shape: expected the {len(axes)} extents of a kernel {axes!r}, such as "
                f"(64, 128) of an 'io' one, found {shown(shape)}. Where the module tells them: "
                "layer_types={MyLinear: lambda module: LayerType(..., "
                "shape=(module.in_features, module.out_features))}"
            )

    def _check_call(self, call: Contraction) -> None:
        """The layout and the equation of a call mean the same kernel, but for what scans take."""
        x, kernel, out = call.parts
        axes = self.layout.axes
        fits = any(map(call.fits, self.layout.without_stacks(len(kernel))))
        if not fits or set(x) - set(kernel) - set(out):
            raise ConfigError(
                f"LayerType: the layout {axes!r} does not fit the call {call.equation!r}: an axis "
                "of the kernel is i where input and kernel have it, o where kernel and output have "
                "it, s where the output has it besides (or, with no letter in the call, where "
                "scans stack such layers), and nothing else may be summed. "
                "randlora_jax.layer_types.of_einsum(equation) makes a LayerType of an equation; "
                "call=None leaves the call unknown"
            )


class LayerRun(NamedTuple):
    """How a layer runs: what it computes, None where that is unknown, and in what dtype."""

    call: Contraction | None
    dtype: DTypeLike


@dataclass(frozen=True)
class Layer:
    """A linear layer an adapter can take.

    Args:
      path: of its module in the JAX model; of its kernel, where the module holds several.
      layout: how its kernel forms matrices.
      shape: of the kernel.
      owner: path of the module that holds the kernel, and whose call uses it.
      leaf: where the kernel is in the owner.
      type: what is known of its type; None where only the user's word on its layout is.
      names: canonical names, PyTorch module paths: one for each matrix of the kernel, in the order
        of its stack axes.
      has_stated_names: a rule gave them; else they are the JAX model's own paths.
      sharding: of the kernel when its model was wrapped; None if it lay on no mesh.
      refusal: why it can take no adapter; None where it can.
      view: the rule of ``views=`` that states its layout, if one does.
      stored: the shape of the array that holds its kernel packed; None where it is not packed.
    """

    path: Path
    layout: KernelLayout
    shape: tuple[int, ...]
    owner: Path
    leaf: Path = ("kernel",)
    type: LayerType | None = None
    names: tuple[str, ...] = ()
    has_stated_names: bool = False
    sharding: NamedSharding | None = None
    refusal: str | None = None
    view: str | None = None
    stored: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Its path, dotted."""
        return ".".join(map(str, self.path))

    @property
    def kernel_path(self) -> Path:
        """Where the kernel lies in the model."""
        return (*self.owner, *self.leaf)

    @property
    def fan_in_fan_out(self) -> bool:
        """Its PyTorch twin holds its weight as (in, out)."""
        return self.type is not None and self.type.fan_in_fan_out

    @property
    def stack(self) -> tuple[int, ...]:
        """Extents of the axes that stack layers; () for a single one."""
        return self.layout.sizes(self.shape)[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """(in, out) of one matrix."""
        return self.layout.sizes(self.shape)[1:]

    @property
    def packed(self) -> tuple[int, ...] | None:
        """The shape of its kernel, where the array that holds it has another."""
        return self.shape if self.stored else None

    @property
    def is_named_as_one(self) -> bool:
        """A stack may be named by its path, where no rule says what PyTorch has."""
        return bool(self.stack) and not self.has_stated_names

    def is_whole(self, patterns: Sequence[str]) -> bool:
        """Whether `patterns` of ``modules_to_save`` train it whole.

        Raises:
          TargetError: they take a part of its matrices, which are one array.
        """
        if self.is_named_as_one and inside_saved(self.name, patterns):
            return True
        taken = [name for name in self.names if inside_saved(name, patterns)]
        if taken and len(taken) < len(self.names):
            raise TargetError(
                f"modules_to_save={shown(patterns)} takes {listed(taken)}, a part of "
                f"{self.name!r}, one array that holds {len(self.names)} layers: take all or none"
            )
        return bool(taken)

    def split(self, arrays: np.ndarray) -> dict[str, np.ndarray]:
        """(*stack, ...) by canonical name, without the stack axes."""
        inner = arrays.shape[len(self.stack) :]
        return dict(zip(self.names, arrays.reshape(-1, *inner), strict=True))

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reverse of `split`."""
        stacked = np.stack([arrays[name] for name in self.names])
        return stacked.reshape(*self.stack, *stacked.shape[1:])

    def running_kernel(
        self, array: jax.Array, known: LayerType | None, kind: str
    ) -> tuple[Kernel, Contraction | None]:
        """Its kernel as it is in a call, held by `array`, and what the layer computes.

        Args:
          known: of the running layer's class, whose name is `kind`.

        Raises:
          ConfigError: as `running`; or `array` is no whole packed kernel.
        """
        if self.stored is None:
            layout, call = self.running(array.shape, known, kind)
            return Kernel.traced(array, layout, self.sharding_within(array.shape)), call
        taken = len(self.stored) - array.ndim  # by scans
        if array.shape != self.stored[taken:] or set(self.layout.axes[:taken]) - {"s"}:
            raise ConfigError(
                f"layer {self.name!r} holds its kernel {self.shape} packed, expected an array of "
                f"shape {self.stored} or what scans over its first axes leave, found {array.shape}"
            )
        shape = self.shape[taken:]
        layout, call = self.running(shape, known, kind)
        return Kernel.traced(array, layout, self.sharding, shape), call

    def sharding_within(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """How the kernel lay on a mesh, of the axes that scans left of it: `shape`."""
        if self.sharding is None:
            return None
        spec = [*self.sharding.spec, *[None] * (len(self.shape) - len(self.sharding.spec))]
        left = self.layout.axes_left(self.shape, shape)
        return NamedSharding(self.sharding.mesh, PartitionSpec(*(spec[i] for i in left)))

    def running(
        self, shape: tuple[int, ...], known: LayerType | None, kind: str
    ) -> tuple[KernelLayout, Contraction | None]:
        """The layout and the call of a layer whose kernel has `shape` left inside scans.

        Args:
          known: of the running layer's class, whose name is `kind`.

        Raises:
          ConfigError: the kernel is a shard; nothing is known of the class, or its layout is not
            this layer's, or its equation has another kernel.
        """
        left = self.layout.axes_left(self.shape, shape)
        whole = tuple(self.shape[i] for i in left)
        if len(shape) == len(whole) and shape != whole:
            raise ConfigError(
                f"layer {self.name!r} runs with a kernel of shape {shape}, expected {whole}, which "
                "its adapter is for. If that is a shard inside jax.shard_map: put the kernel on "
                "the mesh before wrapping, and run under jax.jit without shard_map; adapters "
                "follow how it is cut"
            )
        layout = self.layout.of(left)
        if known is None and self.type is not None:
            raise ConfigError(
                f"layer {self.name!r} is a {kind}, whose kernel layout is unknown: state it, such "
                f"as views={{{'/'.join(map(str, self.path))!r}: 'i o'}}, or leave it out of "
                "target_modules"
            )
        if known is None:
            return layout, None
        theirs = known.layout
        if len(theirs.axes) > len(layout.axes):  # with the axes that scans took away
            theirs = theirs.within(self.shape, shape)
        if not layout.splits(theirs):
            raise ConfigError(
                f"layer {self.name!r} was taken for {layout.axes!r}, but a {kind} holds its kernel "
                f"as {theirs.axes!r}; state views={{...}} accordingly, or layer_types={{...}} with "
                "a letter for each axis of the kernel that it sees"
            )
        if known.call and not known.call.fits(layout):
            kernel = known.call.parts[1]
            raise ConfigError(
                f"layer {self.name!r}, a {kind}, runs with a kernel of shape {shape}, whose "
                f"{len(shape)} axes are {layout.axes!r}, and its type says "
                f"{known.call.equation!r}, with {len(kernel)} axes {kernel!r}: expected the "
                "equation that the layer itself computes, with a letter for each axis of the "
                "kernel that it sees, and none for those along which scans or vmaps stack layers: "
                "layer_types={...: of_einsum(equation, leaf=...)}"
            )
        return layout, known.call
