"""The front end for ``flax.nnx`` modules.

Where the arrays live. A Variable shared by all layers would be one leaf to ``nnx.split`` but one
for each layer to ``jax.tree.leaves``, would lose its sharing in ``jax.tree.map`` and could not pass
a user's ``nnx.scan``. So the root wrapper alone owns the bases, and its call opens a scope from
which the layers inside take them, under whatever transformation they run; a layer called outside
its wrapper's call raises. Lambda and gamma are ``AdapterParam`` variables of the layer they adapt.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax.core.bases import Bases, BasisIdentity
from randlora_jax.core.delta import Term
from randlora_jax.core.kernel_layout import View, Views
from randlora_jax.core.layers import AdapterSpec, How, Layer, Part, adapted
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.layer_types import (
    LayerType,
    LayerTypes,
    Table,
    layer_at,
    of_axes,
    of_einsum,
    running_type,
)
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Names, Path, dotted
from randlora_jax.models.registry import AdapterState, Book, Origin


class AdapterParam(nnx.Variable[jax.Array]):
    """A trained leaf: lambda, gamma, or a leaf of a module trained whole. Never an ``nnx.Param``.

    ``nnx.Optimizer(model, tx, wrt=AdapterParam)`` trains exactly these.
    """


class FrozenAdapterParam(nnx.Variable[jax.Array]):
    """A leaf of an adapter that is applied or kept, but not trained."""


class SharedBasis(nnx.Variable[jax.Array]):
    """One of the two frozen random bases of a pair; the root wrapper alone holds them."""


_open: contextvars.ContextVar[Mapping[str, Bases] | None] = contextvars.ContextVar(
    "randlora_bases", default=None
)


def _linear_general(module: nnx.LinearGeneral) -> LayerType:
    sides = len(module.in_features), len(module.out_features)
    return of_axes(*sides, module.axis, len(module.batch_axis))


TYPES: Table = {
    nnx.Linear: LayerType(View("io")),
    nnx.LinearGeneral: _linear_general,
    nnx.Einsum: lambda module: of_einsum(module.einsum_str),
}


class RandLoraLayer(nnx.Module):
    """Stands in the place of a module and runs it with the adapters joined in.

    Args:
      base_layer: the module it replaces; unknown attributes are looked up there.
      layer: None where only whole leaves are trained.
      known: the type of `base_layer`, None if unknown.
    """

    def __init__(
        self, base_layer: nnx.Module, layer: Layer | None, known: LayerType | None, how: How
    ) -> None:
        self.base_layer = base_layer
        self.randlora_lambda: dict[str, nnx.Variable[jax.Array]] = nnx.data({})
        self.randlora_gamma: dict[str, nnx.Variable[jax.Array]] = nnx.data({})
        self.trained_leaves: dict[str, dict[str, nnx.Variable[jax.Array]]] = nnx.data({})
        self.randlora_dropout: dict[str, nnx.Dropout] = nnx.data({})
        self.specs: tuple[AdapterSpec, ...] = ()  # of the active adapters
        self.merged: tuple[str, ...] = ()
        self.layer = layer
        self.known = known
        self.how = how

    def __getattr__(self, name: str) -> Any:
        if name == "base_layer" or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._effective(), name)

    def held(self) -> tuple[dict[str, Any], ...]:
        """Everything that is kept by adapter name."""
        return (
            self.randlora_lambda,
            self.randlora_gamma,
            self.trained_leaves,
            self.randlora_dropout,
        )

    def holds(self, adapter_name: str) -> bool:
        """Whether an adapter has anything here."""
        return any(adapter_name in held for held in self.held())

    def retype(self, trained: set[str]) -> None:
        """Makes the leaves of the adapters `trained` AdapterParams, all others frozen ones."""
        for leaves in (self.randlora_lambda, self.randlora_gamma):
            for name, leaf in leaves.items():
                leaves[name] = _retyped(leaf, name in trained)
        for name, leaves in self.trained_leaves.items():
            for key, leaf in leaves.items():
                leaves[key] = _retyped(leaf, name in trained)

    def _effective(self) -> nnx.Module:
        """The base layer, with the leaves that the active adapters train whole in place."""
        leaves = {k: v for s in self.specs for k, v in self.trained_leaves.get(s.name, {}).items()}
        if not leaves:
            return self.base_layer
        graph, state = nnx.split(self.base_layer)
        for name, leaf in leaves.items():
            state[name] = state[name].replace(leaf[...].astype(state[name][...].dtype))
        return cast(nnx.Module, nnx.merge(graph, state))

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns, with the active adapters joined in."""
        base = self._effective()
        parts = self._parts()
        if self.layer is None or not parts:
            return base(x, *args, **kwargs)
        leaf = self.layer.leaf
        graph, state = nnx.split(base)
        kernel = state[leaf][...]
        rest = nnx.State({k: v for k, v in state.items() if k != leaf})

        def run(kernel: jax.Array, x: jax.Array) -> jax.Array:
            whole = nnx.State({**rest, leaf: state[leaf].replace(kernel)})
            return cast(jax.Array, nnx.merge(graph, whole)(x, *args, **kwargs))

        kind = type(self.base_layer).__name__
        known = running_type(self.layer, kernel.ndim, self.known, kind)
        dtype = getattr(self.base_layer, "dtype", None) or jnp.result_type(x, kernel)
        return adapted(
            run,
            kernel,
            x,
            parts,
            known.view,
            call=known.call,
            low_precision=jnp.finfo(dtype).bits < 32,
            how=self.how,
            layer=self.layer,
        )

    def _parts(self) -> list[Part]:
        mine = set(self.randlora_lambda) - set(self.merged)
        specs = [spec for spec in self.specs if spec.name in mine]
        bases = _open.get()
        if specs and bases is None:
            raise ConfigError(
                f"layer {self.layer and self.layer.name!r} was called outside its RandLoraModel, "
                "which holds the shared bases: call the wrapped model, or its methods, not a part "
                "of it"
            )
        return [
            Part(
                Term(
                    self.randlora_lambda[s.name][...],
                    self.randlora_gamma[s.name][...],
                    bases[str(s.identity)],  # type: ignore[index]
                    s.scaling,
                ),
                self._drop(s),
            )
            for s in specs
        ]

    def _drop(self, spec: AdapterSpec) -> Any:
        found = self.randlora_dropout.get(spec.name)
        return None if found is None or found.deterministic else found


class NnxRandLora(RandLoraModel, nnx.Module):
    """An nnx model with adapters: call it as the model itself.

    Adapted layers are replaced in place by `RandLoraLayer`. Other methods and attributes of the
    model are reached through the wrapper, which opens the scope with the shared bases.
    """

    def __init__(
        self,
        model: nnx.Module,
        how: How,
        views: Views,
        names: Names,
        types: Table,
        origin: Origin,
    ) -> None:
        self.model = model
        self.types = LayerTypes((types, TYPES))
        self.bases: dict[str, dict[str, SharedBasis]] = nnx.data({})
        layers, modules = {}, set()
        for path, module in nnx.iter_modules(model):
            known, stated = self.types.find(module), views.find(path)
            held = vars(module).items()
            owns = {k: v.get_raw_value() for k, v in held if isinstance(v, nnx.Variable)}
            layer = layer_at(path, owns, known, stated, names)
            if layer:
                layers[layer.name] = layer
            elif owns:
                modules.add(names.first(path))
        self._book = Book(layers, tuple(sorted(modules)), names, origin, how)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        with self._scope():
            return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self.model, name)
        if not inspect.ismethod(found):
            return found

        @functools.wraps(found)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with self._scope():
                return found(*args, **kwargs)

        return scoped

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        pairs = {i: Bases(pair["A"][...], pair["B"][...]) for i, pair in self.bases.items()}
        token = _open.set(pairs)
        try:
            yield
        finally:
            _open.reset(token)

    # What RandLoraModel asks of a front end.

    def _base_leaves(self) -> Mapping[Path, jax.Array]:
        flat = nnx.to_flat_state(nnx.state(self.model, nnx.Param))
        return {tuple(p for p in path if p != "base_layer"): leaf[...] for path, leaf in flat}

    def _wrappers(self) -> dict[Path, RandLoraLayer]:
        return {
            tuple(p for p in path if p != "base_layer"): module
            for path, module in nnx.iter_modules(self.model)
            if isinstance(module, RandLoraLayer)
        }

    def _wrapper(self, path: Path) -> RandLoraLayer:
        """The wrapper around the module at `path`, made and put in its place if need be."""
        here = self._wrappers()
        if path not in here:
            base = _module_at(self.model, path)
            layer = self._book.layers.get(dotted(path))
            known = self.types.find(base)
            _replace(self.model, base, RandLoraLayer(base, layer, known, self._book.how))
            here = self._wrappers()
        return here[path]

    def _set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        for path, leaf in nnx.to_flat_state(nnx.state(self.model, nnx.Param)):
            bare = tuple(p for p in path if p != "base_layer")
            if bare in leaves:
                leaf[...] = leaves[bare]

    def _install(self, spec: AdapterSpec, state: AdapterState, rngs: Any) -> None:
        if spec.dropout and rngs is None:
            raise ConfigError(
                f"randlora_dropout={spec.dropout} draws at random: pass rngs=nnx.Rngs(seed)"
            )
        rngs = nnx.Rngs(rngs) if isinstance(rngs, jax.Array) else rngs
        for name, (lam, gamma) in state.layers.items():
            wrapper = self._wrapper(self._book.layers[name].path)
            wrapper.randlora_lambda[spec.name] = FrozenAdapterParam(lam)
            wrapper.randlora_gamma[spec.name] = FrozenAdapterParam(gamma)
            if spec.dropout:
                wrapper.randlora_dropout[spec.name] = nnx.Dropout(spec.dropout, rngs=rngs)
        for path, value in state.saved.items():
            leaves = self._wrapper(path[:-1]).trained_leaves.setdefault(spec.name, {})
            leaves[path[-1]] = FrozenAdapterParam(value)

    def _remove(self, adapter_name: str) -> None:
        for wrapper in self._wrappers().values():
            for held in wrapper.held():
                held.pop(adapter_name, None)

    def _sync(self) -> None:
        book = self._book
        trained = {n for n in book.active if n in book.trained and n not in book.merged}
        for wrapper in self._wrappers().values():
            wrapper.specs = tuple(book.specs[n] for n in book.active if wrapper.holds(n))
            wrapper.merged = book.merged
            wrapper.retype(trained)

    def _release(self) -> Any:
        for wrapper in self._wrappers().values():
            _replace(self.model, wrapper, wrapper.base_layer)
        return self.model

    def _state(self, adapter_name: str) -> AdapterState:
        state = AdapterState({})
        for path, wrapper in self._wrappers().items():
            if adapter_name in wrapper.randlora_lambda:
                state.layers[dotted(path)] = (
                    wrapper.randlora_lambda[adapter_name][...],
                    wrapper.randlora_gamma[adapter_name][...],
                )
            for leaf, value in wrapper.trained_leaves.get(adapter_name, {}).items():
                state.saved[(*path, leaf)] = value[...]
        return state

    def _trainable_leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(self.model, AdapterParam))

    def _set_bases(self, bases: Mapping[BasisIdentity, Bases]) -> None:
        self.bases = nnx.data(
            {str(i): {"A": SharedBasis(p.A), "B": SharedBasis(p.B)} for i, p in bases.items()}
        )


def _retyped(leaf: nnx.Variable[jax.Array], trained: bool) -> nnx.Variable[jax.Array]:
    kind = AdapterParam if trained else FrozenAdapterParam
    return leaf if type(leaf) is kind else kind(leaf[...])


def _module_at(root: nnx.Module, path: Path) -> nnx.Module:
    for module_path, module in nnx.iter_modules(root):
        if tuple(p for p in module_path if p != "base_layer") == path:
            return module
    raise KeyError(path)


def _replace(root: nnx.Module, old: nnx.Module, new: nnx.Module) -> None:
    """Puts `new` wherever `root` holds `old`, also where two attributes reach it."""
    for _, module in list(nnx.iter_modules(root)):
        if module is new:
            continue
        for name, value in list(vars(module).items()):
            swapped = _swapped(value, old, new)
            if swapped is not value:
                setattr(module, name, swapped)


def _swapped(value: Any, old: Any, new: Any) -> Any:
    """`value` with `old` replaced by `new`, inside containers too; itself if nothing changed."""
    if value is old:
        return new
    if type(value) in (list, tuple):
        parts = [_swapped(v, old, new) for v in value]
        return value if all(map(lambda a, b: a is b, parts, value)) else type(value)(parts)
    if type(value) is dict:
        items = {k: _swapped(v, old, new) for k, v in value.items()}
        return value if all(items[k] is value[k] for k in value) else items
    return value
