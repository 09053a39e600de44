"""The front end for ``flax.linen`` modules and Hugging Face Flax models.

Where the arrays live. Linen keeps state in collections, so trained and frozen numbers get one each
(`randlora_jax.front_ends.collections`).
For a call the adapters' leaves are laid *beside the kernels they adapt* inside ``params``: there,
and only there, ``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and carry them as they do kernels.
An interceptor then finds a layer's own leaves in its own scope, under whatever transformation it
runs. The bases do not vary along a scan; they enter by closure, as tracers of the caller's ``jit``.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.bases import Bases
from randlora_jax.core.delta import Term
from randlora_jax.core.kernel_layout import View, Views
from randlora_jax.core.layers import How, Part, adapted, dropout
from randlora_jax.front_ends.collections import (
    BASES,
    FROZEN,
    GAMMA,
    LAMBDA,
    TRAINED,
    FunctionalRandLora,
)
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
from randlora_jax.models.names import Names, Path, dotted
from randlora_jax.models.registry import Book, Origin

DENSE = LayerType(View("io"))


def _dense_general(module: nn.DenseGeneral) -> LayerType:
    axes, features = (
        tuple(x) if isinstance(x, Iterable) else (x,) for x in (module.axis, module.features)
    )
    return of_axes(len(axes), len(features), axes, len(module.batch_dims))


def _einsum(module: nn.Einsum) -> LayerType | None:
    return of_einsum(module.einsum_str) if module.einsum_str else None  # else the call tells


TYPES: Table = {
    nn.Dense: DENSE,
    nn.DenseGeneral: _dense_general,
    nn.Einsum: _einsum,
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": LayerType(
        View("oi"), fan_in_fan_out=True
    ),
}


class LinenRandLora(FunctionalRandLora):
    """A linen module with adapters: ``model.apply(variables, ...)`` as linen's own.

    ``variables = model.variables`` holds the collections above; train ``variables["randlora"]``.
    Adapter dropout is on exactly when a ``dropout`` rng is passed.
    """

    def __init__(
        self, model: nn.Module, how: How, views: Views, names: Names, types: Table
    ) -> None:
        if model.scope is None:
            raise ConfigError(
                f"the linen module {type(model).__name__} carries no variables: pass "
                "module.bind(variables)"
            )
        module, variables = model.unbind()
        self._start(module, unfreeze(variables), how, views, names, types, {}, Origin())

    def _start(
        self,
        module: nn.Module,
        collections: dict[str, Any],
        how: How,
        views: Views,
        names: Names,
        types: Table,
        found: Mapping[Path, nn.Module],
        origin: Origin,
    ) -> None:
        """`found`: the linen module at each path, where a trace of the model told."""
        self.module = module
        self._begin(collections)
        self._types = LayerTypes((types, TYPES))
        owned: dict[Path, dict[str, jax.Array]] = {}
        for (*parts, leaf), value in flatten_dict(collections["params"]).items():
            owned.setdefault(tuple(parts), {})[leaf] = value
        layers, modules = {}, set()
        for path, arrays in owned.items():
            stated = views.find(path)
            known = self._types.find(found[path]) if path in found else None
            if not found and "kernel" in arrays and arrays["kernel"].ndim == 2:
                known = DENSE  # a plain module is not traced: so it is taken until it is called
            layer = layer_at(path, arrays, known, stated, names)
            if layer:
                layers[layer.name] = layer
            else:
                modules.add(names.first(path))
        self._book = Book(layers, tuple(sorted(modules)), names, origin, how)

    # Running.

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Linen's ``Module.apply`` with the adapters in `variables` joined in."""
        with self._running(variables):
            return self.module.apply(self._joined(variables), *args, **kwargs)

    def _joined(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The collections of the base model, adapter leaves beside the kernels they adapt."""
        params = flatten_dict(unfreeze(variables["params"]))
        trees = {**variables.get(FROZEN, {}), **variables.get(TRAINED, {})}
        for name, tree in trees.items() if self._book.active else ():
            for path, leaf in flatten_dict(unfreeze(tree)).items():
                if path[-1] in (LAMBDA, GAMMA):
                    params[(*path, name)] = leaf
                else:
                    params[path] = leaf.astype(params[path].dtype)
        kept = {k: v for k, v in variables.items() if k not in (TRAINED, FROZEN, BASES)}
        return {**kept, "params": unflatten_dict(params)}

    @contextmanager
    def _running(self, variables: Mapping[str, Any]) -> Iterator[None]:
        """Within, every layer that has adapter leaves beside its kernel joins them in."""
        bases = variables.get(BASES, {})

        def intercept(
            next_fun: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            module = context.module
            if context.method_name != "__call__" or module.scope is None:
                return next_fun(*args, **kwargs)
            own = module.variables.get("params", {})
            if LAMBDA not in own:
                return next_fun(*args, **kwargs)
            return self._call(module, own, bases, *args, **kwargs)

        with nn.intercept_methods(intercept):
            yield

    def _call(
        self,
        module: nn.Module,
        own: Mapping[str, Any],
        bases: Mapping[str, Bases],
        x: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        layer = self._book.layers[dotted(module.path)]
        kernel = own[layer.leaf]
        kind = type(module).__name__
        known = running_type(layer, kernel.ndim, self._types.find(module), kind)
        alone = module.clone(parent=None)
        rest = {k: v for k, v in own.items() if k not in (layer.leaf, LAMBDA, GAMMA)}

        def run(kernel: jax.Array, x: jax.Array) -> jax.Array:
            out = alone.apply({"params": {**rest, layer.leaf: kernel}}, x, *args, **kwargs)
            return cast(jax.Array, out)

        parts = []
        for name in own[LAMBDA]:
            spec = self._book.specs[name]
            term = Term(
                own[LAMBDA][name], own[GAMMA][name], bases[str(spec.identity)], spec.scaling
            )
            drops = spec.dropout > 0 and module.has_rng("dropout")
            drop = dropout(spec.dropout, module.make_rng("dropout")) if drops else None
            parts.append(Part(term, drop))
        dtype = getattr(module, "dtype", None) or jnp.result_type(x, kernel)
        return adapted(
            run,
            kernel,
            x,
            parts,
            known.view,
            call=known.call,
            low_precision=jnp.finfo(dtype).bits < 32,
            how=self._book.how,
            layer=layer,
        )

    # What RandLoraModel asks of a front end.

    def _base_leaves(self) -> Mapping[Path, jax.Array]:
        return cast(Mapping[Path, jax.Array], flatten_dict(self._collections["params"]))

    def _set_base_leaves(self, leaves: Mapping[Path, jax.Array]) -> None:
        params = {**flatten_dict(self._collections["params"]), **leaves}
        self._collections = {**self._collections, "params": unflatten_dict(params)}

    def _release(self) -> Any:
        return self.module.bind(self._collections)


class HuggingFaceRandLora(LinenRandLora):
    """A Hugging Face Flax model with adapters: call it, or ``.generate``, as the model itself.

    ``model.params`` holds the collections above, and is what ``params=`` takes everywhere; every
    other attribute is the model's own.
    """

    def __init__(self, model: Any, how: How, views: Views, names: Names, types: Table) -> None:
        self.model = model
        params = unfreeze(model.params)
        # models with batch statistics keep whole collections in .params
        self._nested = "params" in params
        found = _trace(model)
        self._start(
            model.module,
            params if self._nested else {"params": params},
            how,
            views,
            names,
            types,
            found,
            _origin(model),
        )

    def _release(self) -> Any:
        self.model.params = self._collections if self._nested else self._collections["params"]
        return self.model

    @property
    def params(self) -> dict[str, Any]:
        """Every collection; assign it back after training."""
        return self.variables

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self.variables = dict(params)

    def __call__(self, *args: Any, params: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Calls the model; `params` as `self.params`, which is the default."""
        return self._scoped(self.model.__call__)(*args, params=params, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "_trees"):  # not there yet: __init__ has not run, as under copy
            raise AttributeError(name)
        found = getattr(self.model, name)
        if callable(found) and "params" in _parameters(found):
            return self._scoped(found)
        return found

    def _scoped(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def scoped(*args: Any, params: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
            variables = self.params if params is None else params
            joined = self._joined(variables)
            with self._running(variables):
                return method(*args, params=joined if self._nested else joined["params"], **kwargs)

        return scoped


def _parameters(method: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):
        return {}


def _trace(model: Any) -> dict[Path, nn.Module]:
    """The linen module at each path of a Hugging Face model, by an abstract run of its init."""
    found: dict[Path, nn.Module] = {}

    def note(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        found[context.module.path] = context.module.clone(parent=None)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            functools.partial(model.init_weights, input_shape=model.input_shape), model.key
        )
    return found


def _origin(model: Any) -> Origin:
    """What PEFT records of a base model, from the names of a Hugging Face Flax class."""
    name = type(model).__name__
    return Origin(
        model_type=model.config.model_type,
        name_or_path=model.config._name_or_path or None,
        auto_mapping={
            "base_model_class": name.removeprefix("Flax"),
            "parent_library": type(model).__module__.replace("modeling_flax_", "modeling_"),
        },
        has_output_head=True,
    )
