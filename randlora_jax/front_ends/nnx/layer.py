"""The wrapper that stands in the place of a module and runs it with its adapters."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from flax import nnx
from jax import lax

from randlora_jax.core.abstract import moved
from randlora_jax.core.applying import Contribution, adapted
from randlora_jax.core.applying_rows import BY_VMAP
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.ways import possible_ways, require_a_way
from randlora_jax.front_ends.call_input import input_of, running_layer
from randlora_jax.front_ends.nnx.by_row import run_by_row
from randlora_jax.front_ends.nnx.call import (
    CallContext,
    open_for,
    reached,
    some_rows_differ,
)
from randlora_jax.front_ends.nnx.changes import renew
from randlora_jax.front_ends.nnx.held import raw, scale_at
from randlora_jax.front_ends.nnx.leaves import AdapterLeaves, is_own
from randlora_jax.front_ends.nnx.running import (
    AdaptedKernel,
    as_function,
    refuse_abstract,
    run_in_kernels,
    with_jax_arrays,
)
from randlora_jax.front_ends.nnx.variables import AdapterParam, FrozenAdapterParam
from randlora_jax.front_ends.nnx_types import in_call
from randlora_jax.front_ends.shown_signature import KeepsShown, shows_call_of
from randlora_jax.interop.errors import ConfigError
from randlora_jax.models.filled import refuse_misfit
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.registry import AdapterSpec
from randlora_jax.models.slots import Stack


class WrapperMeta(KeepsShown, type(nnx.Module)):  # type: ignore[misc]
    """Of the modules that stand around a user's."""


class RandLoraLayer(AdapterLeaves, metaclass=WrapperMeta):
    """Stands in the place of a module and runs it with the adapters joined in.

    Its methods and its kernels are those of W + delta while its model is called, however they are
    reached; else, and for all other attributes, the module's own.

    Args:
      base_layer: the module it replaces.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The module's: code that asks ``isinstance(layer, nnx.Linear)`` goes on as without it."""
        base = vars(self).get("base_layer")  # none while it is made
        return type(self) if base is None else base.__class__

    def __reduce__(self) -> tuple[Any, ...]:
        """As by default, which pickle refuses where ``__class__`` is another type's."""
        return object.__new__, (type(self),), self.__getstate__()

    @shows_call_of(lambda self: self.base_layer)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns, with the active adapters joined in."""
        return self._run("__call__", args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._run("__getitem__", (key,), {})

    def __getattr__(self, name: str) -> Any:
        if is_own(name) or "base_layer" not in vars(self):  # the latter while it is made
            raise AttributeError(name)
        if self._call_by_row():
            return self._of_rows(name)
        base, applied = self.base_layer, self._applied()
        is_open = open_for(self.randlora_settings.model, applied) is not None
        running = bool(applied) and is_open
        if isinstance(getattr(type(base), name, None), property | functools.cached_property):
            whole, _ = self._effective()
            return getattr(self._in_kernels(whole) if running else whole, name)
        found = getattr(base, name)
        if getattr(found, "__self__", None) is base:  # a method, of the module or of its class
            return functools.wraps(found)(functools.partial(self._method, name))
        if running and any(layer.leaf[0] == name for layer, _ in applied):
            return getattr(self._in_kernels(self._effective()[0]), name)
        trained = self._trained()
        if name in trained and not is_open:
            return trained[name]
        if any(key.partition("/")[0] == name for key in {*trained, *self._whole_by_row()}):
            return getattr(self._effective()[0], name)
        return found

    def _of_rows(self, name: str) -> Any:
        """What the base layer has, in a call whose rows have adapters of their own.

        Raises:
          ConfigError: it holds, or may be made of, what differs from row to row.
        """
        base = self.base_layer
        own = {slashed(layer.leaf) for layer, _ in self._by_row()} | self._whole_by_row()
        is_property = isinstance(getattr(type(base), name, None), property)
        if any(key == name or key.startswith(f"{name}/") for key in own) or (own and is_property):
            raise ConfigError(
                f"{name!r} of a {type(base).__name__} was read by itself, and adapters make "
                f"another one for each row. {BY_VMAP}"
            )
        found = getattr(base, name)
        if getattr(found, "__self__", None) is base:
            return functools.wraps(found)(functools.partial(self._method, name))
        return found

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the base layer: looked at from outside its model's call, its own."""
        if open_for(self.randlora_settings.model, self._applied()):
            return self._run(name, args, kwargs)
        with self._whole() as base:
            return getattr(base, name)(*args, **kwargs)

    def _call_by_row(self) -> CallContext | None:
        """The open context of this model, where rows have adapters of their own in it."""
        if not some_rows_differ():  # nearly every call
            return None
        context = open_for(self.randlora_settings.model, self._by_row())
        return context if context and context.by_row else None

    def _effective(self) -> tuple[nnx.Module, dict[str, nnx.Variable[Any]]]:
        """The base layer, with the leaves that the active adapters train whole in place.

        Returns:
          It, a copy where there are some; and the Variables that the copy has for them.
        """
        leaves, whole = self._trained(), self.trained_leaves
        in_stacks = any(stack.name in whole for stack in self.randlora_settings.stacks)
        context = open_for(self.randlora_settings.model, self._by_row()) if in_stacks else None
        chosen = context.rows.chosen if context and context.rows else {}
        if not leaves and not chosen:
            return self.base_layer, {}
        graph, state = nnx.split(self.base_layer)
        flat = dict(nnx.to_flat_state(state))
        put: dict[str, nnx.Variable[Any]] = {}
        for path, held in flat.items():
            key = slashed(path)
            for stack in self.randlora_settings.stacks if chosen else ():
                now = raw(put.get(key, held))
                leaf = self._stacked_whole(stack, key, now)
                if leaf is not None:
                    put[key] = held.replace(chosen[stack.name].leaves(leaf, now))
            if key in leaves:
                dtype = raw(held).dtype
                cast_now = functools.partial(lax.convert_element_type, new_dtype=dtype)
                put[key] = held.replace(moved(cast_now, raw(leaves[key])))
        flat |= {path: put[slashed(path)] for path in flat if slashed(path) in put}
        return cast(nnx.Module, nnx.merge(graph, nnx.from_flat_state(flat))), put

    @contextmanager
    def _whole(self) -> Iterator[nnx.Module]:
        """`_effective`; what it becomes within, the base layer does, and what trains in it."""
        base, put = self._effective()
        before = {key: raw(x) for key, x in put.items()}
        yield base
        if not put:
            return
        leaves = self._trained()
        for key, x in put.items():
            if raw(x) is not before[key] and key in leaves:
                leaves[key].set_raw_value(raw(x).astype(raw(leaves[key]).dtype))
        renew(self.base_layer, base, set(map(id, put.values())))

    def _run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the base layer, with the active adapters joined in."""
        self._mind_what_trains()
        if by_row := self._call_by_row():
            return run_by_row(self, method, args, kwargs, by_row)
        with self._whole() as base:
            return self._joined_in(base, method, args, kwargs)

    def _joined_in(
        self, base: nnx.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The same of the base layer with what is trained whole in place."""
        applied = self._applied()
        if not applied:
            return getattr(base, method)(*args, **kwargs)
        context = reached(self.randlora_settings.model, applied)
        (layer, specs), *more = applied
        graph, split = nnx.split(base)
        state = with_jax_arrays(dict(nnx.to_flat_state(split)))
        kernel, call = self._running_kernel(layer, state)
        equated = isinstance(base, nnx.Einsum) and type(base).__call__ is nnx.Einsum.__call__
        if method == "__call__" and equated:
            told = in_call(layer.type, base, nnx.Einsum.__call__, (args, kwargs))
            if told is not layer.type:  # then only the call knows what it computes
                call = told.call if told and kernel.layout.splits(told.layout) else None
        inner = any(isinstance(x, AdapterParam | FrozenAdapterParam) for x in state.values())
        alone = method == "__call__" and call is not None and not more and not inner
        taken = input_of(base.__call__, args, kwargs) if alone else None
        if taken is None:
            kernels = self._kernels(state, context)
            return run_in_kernels(base, method, (args, kwargs), kernels)
        function = as_function(graph, state, layer.leaf, taken, self.randlora_settings.quantiser)
        held, scale = (kernel, call), scale_at(layer.leaf, state)
        running = running_layer(base, layer.name, held, scale, taken.x, function)
        shares = self._shares(layer, specs, kernel.layout, context)
        return adapted(running, taken.x, shares, self.randlora_settings.options)

    def _in_kernels(self, base: nnx.Module) -> nnx.Module:
        """A copy of the base layer with W + delta in place of its kernels."""
        self._mind_what_trains()
        context = reached(self.randlora_settings.model, self._applied())
        graph, state = nnx.split(base)
        flat = with_jax_arrays(dict(nnx.to_flat_state(state)))
        for leaf, kernel, updates in self._kernels(flat, context):
            flat[leaf] = flat[leaf].replace(kernel.taking(updates))
        return cast(nnx.Module, nnx.merge(graph, nnx.from_flat_state(flat)))

    def _kernels(self, state: Mapping[Path, Any], context: CallContext) -> list[AdaptedKernel]:
        """Every kernel here that an active adapter changes, with what is added to it.

        Raises:
          ConfigError: it can take no update, or an adapter needs to see its layer's input.
        """
        found = []
        for layer, specs in self._applied():
            kernel, _ = self._running_kernel(layer, state)
            shares = self._shares(layer, specs, kernel.layout, context)
            drops = any(share.drop for share in shares)
            options = self.randlora_settings.options
            possible = possible_ways(kernel, None, kernel.array.dtype, options, drops=drops)
            require_a_way(layer.name, possible)
            found.append(AdaptedKernel(layer.leaf, kernel, [share.update for share in shares]))
        return found

    def _shares(
        self,
        layer: Layer,
        specs: Sequence[AdapterSpec | Stack],
        layout: KernelLayout,
        context: CallContext,
    ) -> list[Contribution]:
        """What the adapters of `specs` add to a layer in this call."""
        found, key = [], slashed(layer.leaf)
        for spec in specs:
            if isinstance(spec, Stack):
                found += self._shares_of_stack(layer, spec, layout, context)
                continue
            both = [held[spec.name][key] for held in (self.randlora_lambda, self.randlora_gamma)]
            arrays = [leaf.get_raw_value() for leaf in both]  # leaf[...] copies, to no purpose
            for array in arrays:
                refuse_abstract(f"adapter {spec.name} of {layer.name}", array)
            lam, gamma = map(layout.stack_first, arrays)
            refuse_misfit(layer, spec.name, spec.identity.r, lam, gamma)
            update = spec.update(lam, gamma, context.pairs, layer.matrix)
            found.append(Contribution(update, self._drop(spec.name)))
        return found

    def _drop(self, adapter_name: str) -> nnx.Dropout | None:
        """The dropout of an adapter here; None where it is off, or there is none.

        Raises:
          ConfigError: it is on, and nothing can be drawn.
        """
        drop = self.randlora_dropout.get(adapter_name)
        if drop is None or drop.deterministic:
            return None
        if drop.rngs is None:
            raise ConfigError(
                f"adapter {adapter_name!r} is in training mode, with randlora_dropout={drop.rate}, "
                "and was opened frozen and without rngs, so that nothing can be drawn: open it "
                "with rngs=nnx.Rngs(seed), or call model.eval()"
            )
        return drop

    def _shares_of_stack(
        self, layer: Layer, stack: Stack, layout: KernelLayout, context: CallContext
    ) -> list[Contribution]:
        """What the adapters of a stack add where all rows have the same.

        Raises:
          ConfigError: each row has its own.
        """
        assert context.rows is not None
        if context.by_row:
            raise ConfigError(
                f"layer {layer.name!r}: its kernel was asked for by itself, and W + delta is "
                f"another one for each row. {BY_VMAP}"
            )
        lam, gamma = self._stacked(stack, layer, layout)
        chosen = context.rows.chosen[stack.name]
        updates = chosen.updates(lam, gamma, context.pairs[stack.name], layer.matrix)
        return list(map(Contribution, updates))
