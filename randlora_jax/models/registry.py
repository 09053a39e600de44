"""What a wrapped model knows (`AdapterRegistry`) and trains (`AdapterState`), in any framework."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding

from randlora_jax.core.bases import BasisIdentity, BasisPair, Extents, used_extents
from randlora_jax.core.kept import Kept
from randlora_jax.core.mesh import beside, on_host
from randlora_jax.core.update import Update
from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.interop import targets
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError, TargetError, listed, shown
from randlora_jax.models.basis_source import KeptPairs
from randlora_jax.models.finding import FoundLayers, LeftArray
from randlora_jax.models.idle_rules import refuse_idle
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Names, Path, dotted
from randlora_jax.models.slots import BASE, Slot, Stack, stacked


@dataclass
class AdapterState:
    """The numbers of one adapter.

    layers: by `Layer.name`, (lambda (*stack, r, n), gamma (*stack, n, min)), float32.
    saved: leaves of wholly trained modules and biases, by their path in the model; and what a file
      carries of the base model, in other numbers than the model has (`AdapterRegistry.carried`).
    own: in a stack, by the same paths: (capacity,) bool, which of its adapters trained the leaf.
    """

    layers: dict[str, tuple[jax.Array, jax.Array]]
    saved: dict[Path, jax.Array] = field(default_factory=dict)
    own: dict[Path, jax.Array] = field(default_factory=dict)

    def on_host(self) -> "AdapterState":
        """In host memory, whole; called by every process that holds a part."""
        return AdapterState(
            {n: (on_host(lam), on_host(gamma)) for n, (lam, gamma) in self.layers.items()},
            {path: on_host(x) for path, x in self.saved.items()},
        )

    def size(self) -> int:
        """How many numbers it holds."""
        return sum(x.size for x in jax.tree.leaves((self.layers, list(self.saved.values()))))


@dataclass(frozen=True)
class AdapterSpec:
    """What a layer must know of an adapter and cannot train: all static under ``jit``.

    scaling: alpha / r, times what the product of two integers of ternary bases stands for.
    extents: of the pair that PEFT gives this adapter's own targets.
    scale: what the user multiplies its delta by, which no file tells.
    """

    name: str
    scaling: float
    dropout: float
    identity: BasisIdentity
    extents: Extents
    scale: float = 1.0

    @property
    def strength(self) -> float:
        """What delta_W is multiplied by."""
        return self.scaling * self.scale

    def update(
        self,
        lam: jax.Array,
        gamma: jax.Array,
        pairs: Mapping[str, BasisPair],
        matrix: tuple[int, int],
    ) -> Update:
        """What this adapter adds to a layer of (in, out) = `matrix`.

        Args:
          pairs: of the model, by their identity as text.
        """
        return Update(lam, gamma, pairs[str(self.identity)], self.strength, matrix)


@dataclass(frozen=True)
class BaseModelInfo:
    """What a base model says of itself; PEFT records some of it with an adapter.

    tied: canonical names of modules that share a weight in PyTorch, in groups; the model has that
      weight once, in the first of each.
    """

    model_type: str | None = None
    name_or_path: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    has_output_head: bool = False  # and names it as Hugging Face does
    has_torch_paths: bool = False  # its modules' paths are the PyTorch twin's
    tied: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class AdapterRegistry:
    """All a wrapped model knows that is not an array on a device; replaced, never changed.

    Compared by value, so that neither a model in a state in which it was before nor one that is
    like it is traced again; arrays in host memory by digests. What would train if it were active
    makes no difference, nor which adapters are in stacks: that is data.
    """

    layers: Mapping[str, Layer]
    modules: tuple[str, ...]  # canonical names of every other module that owns arrays
    left: tuple[LeftArray, ...]  # arrays that look like kernels and are none of a layer's
    names: Names
    info: BaseModelInfo
    options: ExecutionOptions
    optional: tuple[str, ...] = ()  # expressions on paths of layers that a call may pass by
    configs: Mapping[str, RandLoraConfig] = field(default_factory=dict)
    specs: Mapping[str, AdapterSpec] = field(default_factory=dict)
    kept_pairs: KeptPairs = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)  # of adapters kept one by one, as rows
    active: tuple[str, ...] = ()  # adapters that are applied
    enabled: bool = True  # else no adapter is applied, though some are active
    trained: frozenset[str] = frozenset()  # adapters that train when they are active
    merged: tuple[str, ...] = ()  # adapters whose deltas are in the base kernels
    stacks: tuple[Stack, ...] = ()  # where adapters are kept side by side, if they are
    slots: Mapping[str, Slot] = field(default_factory=dict)  # in these, by adapter
    parts: int = 1  # how many adapters a slot may combine
    chosen: tuple[str, ...] = ()  # what rows take in a call that names none; () for the active one
    originals: Mapping[Path, Kept] = field(default_factory=dict)  # kernels before merging
    # what the files of adapters hold of the base model and nobody trains: PEFT writes embeddings
    # where the vocabulary was resized, and the own weight of an adapted head
    carried: Mapping[str, frozenset[Path]] = field(default_factory=dict)

    def _value(self) -> tuple[Any, ...]:
        kept = {path: original.known for path, original in self.originals.items()}
        found = self.layers, self.modules, self.left, self.names, self.info
        if self.stacks:
            return *found, self.options, self.optional, self.stacks, self.parts
        how = self.options, self.optional, self.active, self.enabled, self.training, self.merged
        numbers = {name: self.numbers.get(name) for name in self.specs}
        return *found, *how, self.configs, self.specs, numbers, set(self.kept_pairs), kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterRegistry) and self._value() == other._value()

    def __hash__(self) -> int:
        if self.stacks:
            return hash(self.stacks)
        return hash((self.applied, self.training, self.merged, frozenset(self.specs)))

    @classmethod
    def of(
        cls,
        found: FoundLayers,
        info: BaseModelInfo,
        names: Names,
        options: ExecutionOptions,
        optional: tuple[str, ...] = (),
    ) -> "AdapterRegistry":
        """Of a model that has no adapter yet.

        Raises:
          ConfigError: an expression of `optional` matches no layer.
        """
        refuse_idle("optional", optional, [layer.path for layer in found.layers.values()])
        return cls(found.layers, found.modules, found.left, names, info, options, optional)

    @cached_property
    def _by_leaf(self) -> Mapping[Path, Layer]:
        return {layer.kernel_path: layer for layer in self.layers.values()}

    def layer_of(self, path: Path) -> Layer | None:
        """The layer that the leaf at `path` belongs to: as its kernel, or beside it."""
        return self._by_leaf.get(path) or self.layers.get(dotted(path[:-1]))

    def is_whole(self, path: Path, patterns: Sequence[str]) -> bool:
        """Whether `patterns` of ``modules_to_save`` train the leaf at `path`.

        Raises:
          TargetError: they take a part of the layers that one array holds.
        """
        if layer := self.layer_of(path):
            return layer.is_whole(patterns)
        return targets.inside_saved(self.names.first(path[:-1]), patterns)

    def renamed(
        self, names: Names, leaves: Iterable[Path], adapted: Container[str]
    ) -> "AdapterRegistry":
        """With other names of its layers and modules, where a rule of `names` gives any.

        A rule of `names` with the very key of one that is here takes its place.

        Args:
          leaves: paths of the base model's.
          adapted: layers that adapters take: an error is about one of these, if it can be.

        Raises:
          TargetError: a rule does not fit a stack.
          ConfigError: a rule matches no layer and no module.
        """
        older = {rule: name for rule, name in self.names.rules.items() if rule not in names.rules}
        rules = Names({**names.rules, **older}, frozenset(older))
        paths = [layer.path for layer in self.layers.values()]
        leaves = list(leaves)
        refuse_idle("names", names.rules, [*paths, *(leaf[:-1] for leaf in leaves)])
        others = {rules.first(leaf[:-1]) for leaf in leaves if not self.layer_of(leaf)}
        found = {
            name: replace(
                self.layers[name],
                names=rules.of(self.layers[name].path, self.layers[name].stack),
                has_stated_names=rules.has_rule(self.layers[name].path, self.layers[name].stack),
            )
            for name in sorted(self.layers, key=lambda name: name not in adapted)
        }
        layers = {name: found[name] for name in self.layers}
        return replace(self, layers=layers, modules=tuple(sorted(others)), names=rules)

    def spec(self, adapter_name: str) -> AdapterSpec:
        """Of the adapter of that name.

        Raises:
          ConfigError: there is none.
        """
        if slot := self.combination(adapter_name):
            raise ConfigError(
                f"{adapter_name!r} combines {listed([name for name, _ in slot.parts])}, and has no "
                "lambda and gamma of its own: name one of these"
            )
        if not isinstance(adapter_name, str) or adapter_name not in self.specs:
            raise ConfigError(
                f"no adapter named {shown(adapter_name)}; this model has {sorted(self.specs)}"
            )
        return self.specs[adapter_name]

    def combination(self, adapter_name: object) -> Slot | None:
        """The slot of a combination of adapters of that name; None where there is none."""
        slot = self.slots.get(adapter_name) if isinstance(adapter_name, str) else None
        return slot if slot and slot.parts else None

    def combining(self, adapter_name: str) -> list[str]:
        """The combinations of which an adapter is a part."""
        slots = self.slots.items()
        return [name for name, slot in slots if adapter_name in (part for part, _ in slot.parts)]

    @cached_property
    def row_stacks(self) -> tuple[Stack, ...]:
        """What rows choose from: the stacks that are kept, or of all adapters as they are now."""
        return self.stacks or stacked(self._pairs_by_adapter)

    @property
    def _pairs_by_adapter(self) -> dict[str, tuple[BasisIdentity, Extents]]:
        return {name: (spec.identity, spec.extents) for name, spec in self.specs.items()}

    def room(self, capacity: int | None) -> tuple[Stack, ...]:
        """Stacks for `capacity` adapters of each pair of bases; None for as many as there are.

        Raises:
          ConfigError: there are more.
        """
        found = stacked(self._pairs_by_adapter, capacity)
        return tuple(replace(stack, members=()) for stack in found)

    def slots_held(self, name: str) -> int | None:
        """How many slots a stack has that is kept under a name; None of an adapter's."""
        return next((stack.capacity for stack in self.stacks if stack.name == name), None)

    @staticmethod
    def spec_of_stack(stack: Stack) -> AdapterSpec:
        """By which a store takes a stack as it does an adapter."""
        return AdapterSpec(stack.name, 1.0, 0.0, stack.identity, stack.extents)

    @property
    def slot_count(self) -> int:
        """How many slots there are, or were: the base model's among them."""
        return self.stacks[-1].slots.stop if self.stacks else 1 + len(self.numbers)

    @property
    def places(self) -> dict[str, int]:
        """Where each adapter lies among the slots of the stacks, kept or made in a call."""
        made = {n: s.slots[i] for s in self.row_stacks for i, n in enumerate(s.members)}
        return made | {name: slot.number for name, slot in self.slots.items()}

    def chosen_slots(self) -> int | list[int]:
        """The slots of a call that names none: one for all rows, or one for each.

        Where adapters are off nothing is in these.
        """
        if self.chosen:
            return [self.slot_of(name) for name in self.chosen]
        return self.active_slot

    @property
    def active_slot(self) -> int:
        """The slot of the active adapter of a model with stacks; 0 for none."""
        return self.slot_of(self.active[0]) if self.stacks and self.active else 0

    def scale(self, adapter_name: str) -> float:
        """How strong an adapter, or a combination, was set to be; 1 at first.

        Raises:
          ConfigError: there is none of that name.
        """
        return (self.combination(adapter_name) or self.spec(adapter_name)).scale

    def slot_of(self, adapter_name: str) -> int:
        """The slot of an adapter, or of a combination, as rows name it.

        Raises:
          ConfigError: there is none of that name.
        """
        if isinstance(adapter_name, str) and adapter_name == BASE:
            return 0
        if isinstance(adapter_name, str) and adapter_name in self.slots:
            return self.slots[adapter_name].number
        return self.numbers[self.spec(adapter_name).name]

    @property
    def applied(self) -> tuple[str, ...]:
        """Adapters that a call applies now, in this order."""
        return self.active if self.enabled else ()

    @property
    def training(self) -> tuple[str, ...]:
        """Adapters whose leaves an optimizer sees, in the order in which they are applied.

        Those of a model whose adapters are off remain what they are, so that such a model and one
        that trains, sharing arrays, look alike to a trainer; nothing reaches their gradients.
        Merged ones train no more, though in nnx they keep their type: a gradient is an error.
        """
        return tuple(n for n in self.active if n in self.trained and n not in self.merged)

    def trained_part(self, adapter_name: str, state: AdapterState) -> AdapterState:
        """What of an adapter's `state` an optimizer moves when it trains."""
        carried = self.carried.get(adapter_name, ())
        return replace(state, saved={p: x for p, x in state.saved.items() if p not in carried})

    def replicated(self, base: Mapping[Path, Any]) -> NamedSharding | None:
        """Where to put what every device needs whole: on the mesh that holds the `base` kernels."""
        found = {beside(base.get(layer.kernel_path)) for layer in self.layers.values()} - {None}
        return found.pop() if len(found) == 1 else None

    def owners(self) -> dict[str, Layer]:
        """The layer that holds the matrix of each canonical name.

        Raises:
          TargetError: two layers have one name.
        """
        found: dict[str, Layer] = {}
        for layer in self.layers.values():
            for name in layer.names:
                if name in found:
                    raise TargetError(
                        f"{found[name].name!r} and {layer.name!r} both have the canonical name "
                        f"{name!r}: correct the names rules"
                    )
                found[name] = layer
        return found

    def used_extents(self, spec: AdapterSpec, layers: Mapping[str, object]) -> Extents:
        """What an adapter's `layers`, by their names, slice of its pair."""
        extents = Extents(0, 0, 0)
        for matrix in {self.layers[name].matrix for name in layers}:
            extents = extents.union(used_extents(matrix, spec.identity.r))
        return extents
