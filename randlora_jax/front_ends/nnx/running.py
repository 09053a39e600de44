"""An nnx module as a function of its kernels and of all else that it reads.

Two of them: a layer that is a sum over axes of its input (`as_function`), and any module at all,
by any of its methods (`run_in_kernels`).
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
from flax import nnx

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.hoisting import Hoisted, is_traced
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.layer_call import Run, comparable
from randlora_jax.core.update import Update
from randlora_jax.front_ends.call_input import Arguments, CallInput, with_input
from randlora_jax.front_ends.nnx.changes import called, renew
from randlora_jax.front_ends.nnx.held import array_at, arrays_of, of_jax, of_numpy, place_of, raw
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.quantised import are_integers


@dataclass(frozen=True)
class _RunLayer:
    """Runs a layer of a given structure, whose arrays come apart.

    Args:
      graph: its structure.
      leaf: where the Variable with its kernel is.
      place: where its input stands among the arguments.
      values: of its state, kernel first, and of the call's other arguments.
      quantiser: the class around it that quantises, which tells apart layers that are alike.
    """

    graph: nnx.GraphDef[nnx.Module]
    leaf: Path
    place: int | str
    values: Hoisted
    quantiser: type | None

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.graph, self.leaf, self.place, self.values, self.quantiser))

    def __hash__(self) -> int:  # looked up more than once a call, and graphs take their time
        return self._hash

    def __call__(self, kernel: jax.Array, x: jax.Array, *read: jax.Array) -> jax.Array:
        """What the layer returns."""
        variable, rest, args, kwargs = self.values.with_arrays([kernel, *read])
        args, kwargs = with_input((args, kwargs), self.place, x)
        flat = {**rest, self.leaf: variable}
        out, changes = called(self.graph, flat, "__call__", (args, kwargs))
        if changes:
            kind = type(nnx.merge(self.graph, nnx.from_flat_state(flat))).__name__
            if any(map(are_integers, changes)):
                raise ConfigError(
                    f"a {kind} was quantised in its call, its adapter around it: "
                    "quantise the model first, then wrap it"
                )
            raise ConfigError(
                f"a {kind} changes its {dotted(changes[0])!r} when it is "
                "called, so it is more than a sum over its input: state its type without its "
                "call, layer_types={...: LayerType(layout, call=None)}"
            )
        return cast(jax.Array, out)


def with_jax_arrays(state: Mapping[Path, Any]) -> dict[Path, Any]:
    """`state` with JAX's arrays for NumPy's, which `nnx.update` puts into Variables.

    Raises:
      ConfigError: it is abstract.
    """
    found = dict(state)
    for path, value in state.items():
        for inner, array in arrays_of(value).items():
            refuse_abstract(dotted((*path, *inner)), array)
        if isinstance(value, nnx.Variable) and of_numpy(value):
            found[path] = value.replace(of_jax(value))
    return found


def refuse_abstract(name: str, value: Any) -> None:
    """Nothing, if `value` has numbers.

    Raises:
      ConfigError: it is abstract.
    """
    if is_abstract(value):
        raise ConfigError(
            f"{name!r} is abstract, a ShapeDtypeStruct: call this model abstractly, "
            "nnx.eval_shape(lambda model, x: model(x), model, x), or fill it first, such as by "
            "nnx.update(model, state) with a state that was restored; the shared bases, where no "
            "checkpoint has them, by model.draw_bases()"
        )


def as_function(
    graph: nnx.GraphDef[nnx.Module],
    state: Mapping[Path, Any],
    leaf: Path,
    taken: CallInput,
    quantiser: type | None,
) -> tuple[Run, Sequence[jax.Array]]:
    """A layer as a function of its kernel and its input; and all else that it reads.

    Args:
      graph: of the layer.
      state: of the layer, by path.
      leaf: where its kernel is.
      quantiser: the class around it that quantises, if one does.
    """
    place = place_of(leaf, state)
    rest = {path: value for path, value in state.items() if path != place}
    values, (kernel, *read) = Hoisted.of((state[place], rest, *taken.rest))
    assert kernel is array_at(leaf, state)  # the first of a quantised array are its integers
    return comparable(_RunLayer(graph, place, taken.place, values, quantiser)), read


class AdaptedKernel(NamedTuple):
    """A kernel that takes updates in a call.

    Args:
      leaf: where it is in its module.
      kernel: as it lies there.
      updates: of the active adapters.
    """

    leaf: Path
    kernel: Kernel
    updates: Sequence[Update]


def run_in_kernels(
    module: nnx.Module, method: str, arguments: Arguments, kernels: Sequence[AdaptedKernel]
) -> Any:
    """What a method of `module` returns, with W + delta in place of its `kernels`.

    Where it is traced, W + delta is formed again for the backward pass. What the call changes of
    the module or of its arguments is changed there.
    """
    whole = (module, *arguments)
    graph, state = nnx.split(whole)
    values, arrays = Hoisted.of(state)
    aside: list[tuple[nnx.GraphDef[Any], Hoisted, Hoisted, list[int | None]]] = []

    def run(arrays: list[jax.Array], updates: Sequence[Sequence[Update]]) -> list[jax.Array]:
        flat = dict(nnx.to_flat_state(values.with_arrays(arrays)))
        bare = {(0, *leaf): flat[0, *leaf] for leaf, _, _ in kernels}
        for (leaf, kernel, _), mine in zip(kernels, updates, strict=True):
            now = replace(kernel, array=raw(bare[0, *leaf])).taking(mine)
            flat[0, *leaf] = bare[0, *leaf].replace(now)
        copies = nnx.merge(graph, nnx.from_flat_state(flat))
        copy, args, kwargs = copies
        result, out = Hoisted.of(getattr(copy, method)(*args, **kwargs))
        graph_now, state_now = nnx.split(copies)
        flat_now = dict(nnx.to_flat_state(state_now))
        for path, held in bare.items():
            if raw(flat_now.get(path)) is raw(flat[path]):
                flat_now[path] = held
        values_now, arrays_now = Hoisted.of(nnx.from_flat_state(flat_now))
        places = {id(array): i for i, array in enumerate(arrays)}
        kept = [places.get(id(array)) for array in arrays_now]
        aside.append((graph_now, values_now, result, kept))
        return out + [x for x, place in zip(arrays_now, kept, strict=True) if place is None]

    updates = [kernel.updates for kernel in kernels]
    traced = is_traced((arrays, updates))
    results = iter((jax.checkpoint(run) if traced else run)(arrays, updates))
    graph_now, values_now, result, kept = aside[-1]
    out = result.with_arrays(list(itertools.islice(results, result.others.count(None))))
    now = [next(results) if place is None else arrays[place] for place in kept]
    renew(whole, nnx.merge(graph_now, values_now.with_arrays(now)))
    return out
