"""What a wrapper holds of its adapters: which of its layers they change, and with what."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax.core.contraction import Contraction
from randlora_jax.core.frozen import refuse_gradient
from randlora_jax.core.kernel import Kernel
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.front_ends.nnx.call import ModelToken, OpenCalls
from randlora_jax.front_ends.nnx.held import array_at, in_jax, raw
from randlora_jax.front_ends.nnx.running import refuse_abstract
from randlora_jax.front_ends.nnx.variables import (
    AdapterParam,
    AdapterSlots,
    CarriedParam,
    retyped,
)
from randlora_jax.interop.errors import ConfigError, warn
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, slashed
from randlora_jax.models.registry import AdapterRegistry, AdapterSpec
from randlora_jax.models.slots import Stack, in_slots, own_or_base, slots_apart

Leaves = dict[str, nnx.Variable[jax.Array]]

# Of a wrapper itself: what it is made of, and what Python and flax keep in every module.
_OWN = ("base_layer", "trained_leaves")
OWN_PREFIXES = ("randlora_", "__", "_pytree_", "_nnx_")


@dataclass(frozen=True)
class Settings:
    """All that a wrapper knows and that is no array: static under ``jit``.

    Args:
      layers: those whose kernels its module holds; none where only whole leaves are trained.
      options: how layers apply their adapters.
      model: whose call it belongs to.
      specs: of the adapters that are active and have something here.
      trained: names of the adapters whose leaves are to be `AdapterParam`.
      merged: names of the adapters whose deltas are in the kernels.
      stacks: what rows of a batch choose from, as far as something of it is here.
      quantiser: the class around it that quantises, if one does.
    """

    layers: tuple[Layer, ...]
    options: ExecutionOptions
    model: ModelToken
    specs: tuple[AdapterSpec, ...] = ()
    trained: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    quantiser: type | None = None


_MERGED = (
    "a gradient is taken of adapter {}, which is merged into the base model, where nothing reaches "
    "it: unmerge_adapter() first. (To train a merged model's base, merge_and_unload() it first.)"
)


def _chosen_by_another(adapter_name: str, is_trained: bool) -> str:
    """What is told of an adapter's leaves that are not of the type that the model gave them."""
    was, now = ("frozen", "trained") if is_trained else ("trained", "frozen")
    return (
        f"adapter {adapter_name!r} is {was} in this model, and another one made its leaves {now} "
        "that has the same Variables (nnx.view and nnx.merge(*nnx.split(model)) make such "
        "models): set_adapter() makes them this model's again. Of models with the same Variables "
        "let one alone choose what trains; nnx.clone(model) has Variables of its own, around the "
        "same arrays"
    )


def is_own(name: str) -> bool:
    """Whether a wrapper looks for an attribute in itself, and never in its module."""
    return name in _OWN or name.startswith(OWN_PREFIXES)


class AdapterLeaves(nnx.Module):
    """A module and what adapters have in it.

    Args:
      base_layer: the module.
    """

    def __init__(self, base_layer: nnx.Module, settings: Settings) -> None:
        self.base_layer = base_layer
        # by adapter, and by where the kernel or leaf is in the module
        self.randlora_lambda: dict[str, Leaves] = nnx.data({})
        self.randlora_gamma: dict[str, Leaves] = nnx.data({})
        self.trained_leaves: dict[str, Leaves] = nnx.data({})
        self.randlora_dropout: dict[str, nnx.Dropout] = nnx.data({})
        # by stack, of its trained leaves: which of its adapters trained them
        self.randlora_own: dict[str, dict[str, AdapterSlots]] = nnx.data({})
        self.randlora_settings = settings
        self.randlora_calls: OpenCalls = nnx.data(OpenCalls())

    def __setattr__(self, name: str, value: Any) -> None:
        """What adapters have here is set here; anything else in the module, which runs with it.

        A leaf that the active adapters train whole runs in its stead, so that is set.
        """
        if is_own(name):
            super().__setattr__(name, value)
        elif name in (trained := self._trained()):
            trained[name].set_raw_value(in_jax(raw(value)))
        else:
            setattr(self.base_layer, name, value)

    def __delattr__(self, name: str) -> None:
        if is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.base_layer, name)

    def _held(self) -> tuple[dict[str, Any], ...]:
        """Everything that is kept by adapter name."""
        return (
            self.randlora_lambda,
            self.randlora_gamma,
            self.trained_leaves,
            self.randlora_dropout,
            self.randlora_own,
        )

    def _follow(self, registry: AdapterRegistry) -> None:
        """Applies and trains the adapters that the registry says, as far as they are here."""
        here = {name for held in self._held() for name in held}
        specs = tuple(registry.specs[name] for name in registry.applied if name in here)
        stacks = tuple(s for s in registry.row_stacks if here & {s.name, *s.members})
        # merged ones remain what they are, as do those that are off
        trained = tuple(name for name in registry.active if name in registry.trained)
        self.randlora_settings = replace(
            self.randlora_settings,
            specs=specs,
            trained=trained,
            merged=registry.merged,
            stacks=stacks,
        )
        for held in self._held()[:3]:
            for name, leaves in held.items():
                for key, leaf in leaves.items():
                    leaves[key] = retyped(leaf, trained=name in trained)

    def _chosen_by_another(self) -> str | None:
        """What to say where leaves of active adapters are not of the type that this model gave."""
        for name in (spec.name for spec in self.randlora_settings.specs):
            for leaf in self._leaves_of(name):
                is_trained = isinstance(leaf, AdapterParam)
                follows = not isinstance(leaf, CarriedParam)
                if follows and is_trained != (name in self.randlora_settings.trained):
                    return _chosen_by_another(name, is_trained)
        return None

    def _mind_what_trains(self) -> None:
        """Warns where another model, which has the same Variables, chose what trains.

        What is computed is the same, so a state that was split off before runs on.

        Raises:
          ConfigError: a gradient is taken of an adapter that is merged.
        """
        if why := self._chosen_by_another():
            warn(why)
        for name in self.randlora_settings.merged:
            for leaf in self._leaves_of(name):
                if isinstance(leaf, AdapterParam):
                    refuse_gradient(leaf.get_raw_value(), _MERGED.format(repr(name)))

    def _trained(self) -> Leaves:
        """What the active adapters train whole, by where it is in the base layer."""
        held = self.trained_leaves
        return {
            key: x
            for spec in self.randlora_settings.specs
            for key, x in held.get(spec.name, {}).items()
        }

    def _leaves_of(self, adapter_name: str) -> Iterator[nnx.Variable[Any]]:
        return (x for held in self._held()[:3] for x in held.get(adapter_name, {}).values())

    @property
    def _kept_in_stacks(self) -> bool:
        """Whether all that is here lies in stacks."""
        return any(not stack.members for stack in self.randlora_settings.stacks)

    def _by_row(self) -> list[tuple[Layer, list[Stack]]]:
        """The layers here that adapters of some stack change, with these stacks."""
        found = []
        for layer in self.randlora_settings.layers:
            key = slashed(layer.leaf)
            stacks = [
                stack
                for stack in self.randlora_settings.stacks
                if any(key in self.randlora_lambda.get(n, {}) for n in stack.held)
            ]
            if stacks:
                found.append((layer, stacks))
        return found

    def _stacked(
        self, stack: Stack, layer: Layer, layout: KernelLayout
    ) -> tuple[jax.Array, jax.Array]:
        """Lambda and gamma of all adapters of a stack, in a layer: (*stack axes, slots, ...).

        Raises:
          ConfigError: one of them draws its dropout, which no row can.
        """
        key = slashed(layer.leaf)

        def one(kept: Mapping[str, Leaves]) -> jax.Array:
            leaves = {name: kept[name][key] for name in stack.held if key in kept.get(name, {})}
            arrays = {name: leaf.get_raw_value() for name, leaf in leaves.items()}
            for array in arrays.values():
                refuse_abstract(f"adapters of {layer.name}", array)
            first = {name: layout.stack_first(array) for name, array in arrays.items()}
            if not stack.members:
                return slots_apart(first[stack.name], stack.capacity)
            return in_slots([first.get(name) for name in stack.members])

        for name in stack.members:
            drop = self.randlora_dropout.get(name)
            if drop is not None and not drop.deterministic:
                raise ConfigError(
                    f"adapter {name!r} is in training mode, with dropout, and adapter_names are "
                    "for inference, as in PEFT: call model.eval() first"
                )
        return one(self.randlora_lambda), one(self.randlora_gamma)

    def _stacked_whole(self, stack: Stack, key: str, base: Any) -> jax.Array | None:
        """(slots, ...) of a leaf that adapters of a stack trained whole; None where none did.

        Args:
          base: what those have that did not.
        """
        if key not in self._whole_by_row():
            return None
        leaves = [self.trained_leaves.get(name, {}).get(key) for name in stack.held]
        if all(leaf is None for leaf in leaves):
            return None
        arrays = [base if leaf is None else leaf.get_raw_value() for leaf in leaves]
        if stack.members:
            return jnp.stack(arrays)
        return own_or_base(arrays[0], self.randlora_own[stack.name][key].get_raw_value(), base)

    def _whole_by_row(self) -> set[str]:
        """Leaves here that adapters of some stack trained whole."""
        names = [name for stack in self.randlora_settings.stacks for name in stack.held]
        return {key for name in names for key in self.trained_leaves.get(name, {})}

    def _applied(self) -> Sequence[tuple[Layer, Sequence[AdapterSpec | Stack]]]:
        """The layers here that an active adapter changes when they run, with these adapters."""
        if self._kept_in_stacks:
            return self._by_row()
        settings, found = self.randlora_settings, []
        for layer in settings.layers:
            key = slashed(layer.leaf)
            specs = [
                spec
                for spec in settings.specs
                if spec.name not in settings.merged
                and key in self.randlora_lambda.get(spec.name, {})
            ]
            if specs:
                found.append((layer, specs))
        return found

    def _running_kernel(
        self, layer: Layer, state: Mapping[Path, Any]
    ) -> tuple[Kernel, Contraction | None]:
        """The kernel of a layer as it is in this call, and what the layer computes."""
        array = array_at(layer.leaf, state)
        return layer.running_kernel(array, layer.type, type(self.base_layer).__name__)
