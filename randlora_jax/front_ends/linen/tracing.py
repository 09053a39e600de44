"""What an abstract run of a linen model tells of its modules.

Beside each kernel lies a mark, a box for scans and vmaps: they take away from it the number of the
axis along which they slice, so that it tells which axes of the kernel stack layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
from flax import struct
from flax.core import DenyList, meta
from flax.errors import ScopeParamShapeError

from randlora_jax.core.hoisting import Hoisted
from randlora_jax.front_ends.call_token import CallToken
from randlora_jax.front_ends.linen.beside import (
    BESIDE,
    TOLD,
    Told,
    without,
)
from randlora_jax.front_ends.linen.lifted import is_lifted, maps_around, method_of, run_with, runs
from randlora_jax.front_ends.linen.normed import MAPPED, NORMED
from randlora_jax.front_ends.linen.types import OTHER, is_bridge, modules_inside, type_of
from randlora_jax.front_ends.params import flat, place_beside, unboxed, with_entries
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.finding import multiplies_another
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import LayerTypes
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.sample_inputs import SampleInputs

_MARKS = "marks"

Axes = tuple[int, ...]


@dataclass(frozen=True)
class TracedModule:
    """A module that ran.

    Args:
      within: path of the linen module that it is a part of, or is.
      is_part: it is an nnx module in that one.
      kind: the name of its class.
      type: what is known of its class as a layer.
      is_stated: a user's ``layer_types=`` says so.
      other: what it is known to be instead.
      axes: by param, those axes that the module sees; the others stack layers.
      own: names of the params that it made itself; the others are its submodules'.
    """

    within: Path
    is_part: bool
    kind: str
    type: LayerType | None
    other: str | None
    axes: Mapping[str, Axes]
    is_stated: bool = False
    own: frozenset[str] = frozenset()


@dataclass
class Trace:
    """What was met in abstract runs of a model.

    Args:
      types: of layers.
      stated: those of them that a user tells.
      modules: by path (``/`` between its parts).
      normed: why no kernel under a path takes an adapter.
      kinds: classes of modules.
    """

    types: LayerTypes
    stated: LayerTypes
    modules: dict[str, TracedModule] = field(default_factory=dict)
    normed: dict[Path, str] = field(default_factory=dict)
    kinds: set[type] = field(default_factory=set)
    _marked: bool = field(default=False, init=False)

    def initialised(self, init: Callable[..., Any], key: jax.Array) -> None:
        """Takes down what `init` meets, which makes a model's params."""
        with nn.intercept_methods(self._intercept):
            jax.eval_shape(init, key)

    def called(self, module: nn.Module, variables: Mapping[str, Any], sample: SampleInputs) -> None:
        """Takes down what a call of `module` meets.

        Raises:
          ConfigError: it cannot be called with `sample`.
        """
        try:
            try:
                self._call(module, variables, sample, marked=True)
            except ScopeParamShapeError:  # of a mark among arrays that are one param of a module
                self._call(module, variables, sample, marked=False)
                self._call(module, variables, sample, marked=True)
        except Exception as error:
            raise ConfigError(
                f"sample_inputs: {type(module).__name__} cannot be called with them: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _call(
        self, module: nn.Module, variables: Mapping[str, Any], sample: SampleInputs, *, marked: bool
    ) -> None:
        params = self._with_marks(variables["params"]) if marked else variables["params"]
        call = {**variables, "params": params}, sample.args, sample.kwargs
        values, arrays = Hoisted.of(call, (jax.Array, jax.ShapeDtypeStruct))

        def run(arrays: list[jax.Array], key: jax.Array) -> None:
            variables, args, kwargs = values.with_arrays(arrays)
            all_else = {"rngs": {"params": key}, "mutable": DenyList(("params",))}
            module.apply(variables, *args, method=sample.method, **all_else, **kwargs)

        self._marked = marked
        with nn.intercept_methods(self._intercept):
            jax.eval_shape(run, arrays, jax.random.key(0))

    def holder_of(self, path: Path) -> tuple[Path, TracedModule] | None:
        """The module that holds the array at `path` itself, and its path; None where none ran."""
        for i in range(len(path) - 1, -1, -1):
            found = self.modules.get(slashed(path[:i]))
            if found is not None:
                holds = i == len(path) - 1 or path[i] in found.own or found.is_part
                return (path[:i], found) if holds else None
        return None

    def _with_marks(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """`params` with a mark beside each array, and a token: what ``nn.jit`` traced is no run."""
        marks: dict[Path, dict[str, _Axes]] = {}
        for path, held in flat(params).items():
            known, array = self.holder_of(path), unboxed(held)
            most = len(known[1].within) if known else len(path)
            place = place_beside(params, path, most)
            mark = _Axes(array, tuple(range(array.ndim)))
            marks.setdefault(place, {})[slashed(path[len(place) :])] = mark
        told = Told((), CallToken())
        beside = {(*place, BESIDE): {_MARKS: mine, TOLD: told} for place, mine in marks.items()}
        return with_entries(params, beside)

    def _intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if module.scope is None or not runs(context) or is_lifted(context):
            return call(*args, **kwargs)
        marks = dict(_marks_in(module.variables.get("params", {})))
        if marks or not self._marked:  # else it is a model of its own, applied within this one
            self._note(module, method_of(context), (args, kwargs), marks)
        read: nn.Module | None = None  # whose params it takes as they are
        if is_bridge(module):
            read = module
        elif isinstance(module, NORMED):
            read = module.layer_instance
            self.normed[read.path] = multiplies_another(f"a {type(module).__name__}")
        if read is not None and any(_marks_in(read.variables.get("params", {}))):
            return run_with(module, method_of(context), (args, kwargs), without)
        out = call(*args, **kwargs)
        if (noted := self.modules.get(slashed(module.path))) is not None:
            made = module.scope.reservations.items()
            own = noted.own | {name for name, collections in made if "params" in collections}
            self.modules[slashed(module.path)] = replace(noted, own=own)
        return out

    def _note(
        self,
        module: nn.Module,
        method: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        marks: Mapping[Path, Axes],
    ) -> None:
        """Takes down a module that is about to run, or the nnx modules in it."""
        if maps_around(module):
            self.normed[module.path] = MAPPED
        bridges = is_bridge(module)
        if bridges:
            inside = modules_inside(module).items()
            found = {path: (part, self.types.find(part)) for path, part in inside}
        else:
            found = {(): (module, type_of(self.types, module, method, arguments))}
        for inner, (part, known) in found.items():
            self.kinds.add(type(part))
            key = slashed((*module.path, *inner))
            before = self.modules.get(key)
            if before is None or before.type is None:  # else it shares a layer's scope
                kinds = (what for kind, what in OTHER.items() if isinstance(part, kind))
                axes = {
                    slashed(p[len(inner) :]): a
                    for p, a in marks.items()
                    if p[: len(inner)] == inner
                }
                self.modules[key] = TracedModule(
                    module.path,
                    bridges,
                    type(part).__name__,
                    known,
                    next(kinds, None),
                    axes,
                    self.stated.find(part) is not None,
                )


class _Axes(struct.PyTreeNode, meta.AxisMetadata):
    """The numbers of an array's axes, which lies in it for scans to count."""

    value: Any
    left: Axes = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Axes":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[Any, Any]) -> "_Axes":
        return self  # what comes out of the run is not looked at

    def remove_axis(self, index: int, params: Mapping[Any, Any]) -> "_Axes":
        left = list(self.left)
        del left[index]
        return self.replace(left=tuple(left))


def _marks_in(params: Mapping[str, Any]) -> Iterator[tuple[Path, Axes]]:
    """By the path of an array among `params`, those of its axes that are left."""
    for key, value in params.items():
        if key == BESIDE:
            for leaf, mark in value[_MARKS].items():
                yield tuple(leaf.split("/")), mark.left
        elif isinstance(value, Mapping):
            for path, left in _marks_in(value):
                yield (key, *path), left
