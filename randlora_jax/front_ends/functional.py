"""A wrapped model that is a function of its variables: what it takes, and what it refuses.

Variables are trees that users take apart, save and put together again, so whatever can be missing
or not fit is looked for before anything runs: as for all that only shapes decide, under ``jit``
this costs nothing after tracing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from randlora_jax.core.abstract import is_abstract
from randlora_jax.core.bases import BasisPair
from randlora_jax.core.frozen import never_trained
from randlora_jax.core.hoisting import is_traced
from randlora_jax.core.mesh import beside
from randlora_jax.front_ends.collections import (
    FROZEN,
    GAMMA,
    LAMBDA,
    PAIRS,
    SLOTS,
    SPECS,
    TRAINED,
    CollectionStore,
    Known,
    adapter_trees,
    as_arrays,
    base_arrays,
    base_collections,
    refuse_abstract,
    state_of,
    without_carried,
)
from randlora_jax.front_ends.params import flat
from randlora_jax.front_ends.variable_checks import (
    WHOLE,
    check_kind,
    check_leaves,
    check_merged,
    check_pair,
    check_spec,
)
from randlora_jax.interop.errors import ConfigError, listed, shown, warn
from randlora_jax.models import stacking
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.registry import AdapterSpec
from randlora_jax.models.slots import RowChoice, SlotTable

_TRAINED_ALONE = (
    "with an optimizer of all variables it is being trained. For the adapter alone: differentiate "
    "variables['randlora'], the first of trained, frozen = model.split()."
)


class FunctionalRandLora(RandLoraModel):
    """A model that is a function of its variables.

    `_collections` holds them; what the base model's own are, its front end says.
    """

    _collections: CollectionStore

    @property
    def _store(self) -> CollectionStore:
        return self._collections

    @property
    def variables(self) -> dict[str, Any]:
        """Every collection; assign it back after training.

        "randlora_specs" has no leaves: it makes variables of other adapters, or of the same at
        another scale, another tree for ``jit``. Stacks (`stack_adapters`) are frozen, by their
        names, and "randlora_slots" tells what their slots stand for.

        Raises:
          ConfigError: what is assigned lacks something, holds what is not this model's as it is
            now, or is from before `merge_adapter` or `unmerge_adapter`.
        """
        return self._variables_with(self._held or self._registry.applied)

    @variables.setter
    def variables(self, variables: Mapping[str, Any]) -> None:
        check_kind(variables)
        lost = [name for name, held in self.variables.items() if held and name not in variables]
        if lost:
            raise ConfigError(
                f"the variables lack the collections {listed(lost)}, which would be lost: {WHOLE}"
            )
        self._check_adapters(variables)
        check_merged(self._merged, self._merged_in(variables))
        store = self._collections
        if self._registry.stacks:
            store.set_slots(self._table_in(as_arrays(variables), now=True))
        for name, tree in adapter_trees(as_arrays(unfreeze(variables))).items():
            # of a merged adapter, lambda and gamma are no variables, and stay
            leaves = {**flatten_dict(store.trees[name]), **flatten_dict(tree)}
            store.trees[name] = unflatten_dict(leaves)
        store.base = base_arrays(unfreeze(base_collections(variables)))
        if self._pairs_are_gone():
            if self._registry.stacks:
                self.draw_bases()
            else:
                self._refresh_pairs(store)

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what an optimizer trains, all other collections): pytrees of arrays.

        ``{**frozen, "randlora": trained}`` is the whole again, what `apply` takes. Warns where
        adapters are applied and none of them trains.
        """
        frozen = self.variables
        trained, applied = frozen.pop(TRAINED), self._registry.applied
        if applied and not trained and not self._registry.stacks:
            warn(
                f"nothing here is to be trained: {listed(applied)} is applied, and frozen. To "
                f"train it, model.set_adapter({applied[-1]!r}), or open it by "
                "RandLoraModel.from_pretrained(..., is_trainable=True)"
            )
        return trained, frozen

    def _pairs_are_gone(self) -> bool:
        """Whether some were given away, wait for numbers, or lie elsewhere than the kernels do."""
        base, pairs = self._store.base_leaves(), jax.tree.leaves(self._store.pairs())
        where = self._registry.replicated(base)
        moved = not is_traced(list(base.values())) and any(beside(x) != where for x in pairs)
        return moved or any(map(_is_gone, pairs))

    @property
    def _held(self) -> tuple[str, ...]:
        """The names of the stacks that are kept."""
        return tuple(stack.name for stack in self._registry.stacks)

    def _variables_with(self, names: Iterable[str]) -> dict[str, Any]:
        """Every collection, with the adapters or stacks of `names`."""
        registry, store = self._registry, self._collections
        trees = {name: self._tree(name) for name in names}
        trained = {n: tree for n, tree in trees.items() if n in registry.training}
        frozen = {n: tree for n, tree in trees.items() if n not in trained}
        for name in [name for name in trained if registry.carried[name]]:
            trained[name], carried = without_carried(trees[name], registry.carried[name])
            frozen |= {name: carried} if carried else {}
        table = store.slots() if registry.stacks else None
        slots = {SLOTS: table._asdict()} if table else {}  # in stacks, strengths are numbers there
        told = [n for n in registry.specs if n in trees or n in registry.merged]
        specs = {n: Known(registry.specs[n], i, n in registry.merged) for i, n in enumerate(told)}
        ours = {TRAINED: trained, FROZEN: frozen, PAIRS: dict(store.pairs()), SPECS: specs}
        return {**store.base, **ours, **slots}

    def _variables_for(self, adapter_names: Any) -> dict[str, Any]:
        """The model's own, with all from which rows of a call may choose."""
        if adapter_names is None or self._registry.stacks:
            return self.variables
        return self._variables_with(self._registry.specs)

    def _rows_in(
        self, variables: Mapping[str, Any], adapter_names: Any, beams: int = 1
    ) -> RowChoice | None:
        """What a call with `variables`, which are checked, takes of the stacks."""
        table = self._table_in(variables) if self._registry.stacks else None
        return self._chosen(adapter_names, beams, table)

    def _tree(self, adapter_name: str) -> dict[str, Any]:
        """An adapter's leaves; those whose delta is merged into the kernels left out."""
        tree = self._collections.trees[adapter_name]
        if adapter_name not in self._registry.merged:
            return tree
        leaves = flatten_dict(tree)
        return unflatten_dict({p: x for p, x in leaves.items() if p[-1] not in (LAMBDA, GAMMA)})

    def _checked(
        self, variables: Mapping[str, Any], adapter_names: Any = None
    ) -> Mapping[str, Any]:
        """`variables`, if this model can run with them.

        Args:
          adapter_names: what rows of the batch take; None where the call does not say.

        Raises:
          ConfigError: the bases or other parts are missing, or something in them is not this
            model's, or has no numbers yet.

        Warns where the trained leaves are missing, so that the base model runs.
        """
        check_kind(variables)
        refuse_abstract(variables)
        registry, given = self._registry, adapter_trees(variables)
        if registry.stacks or adapter_names is not None:
            self._check_stacked(variables)
            return variables
        merged = self._merged_in(variables)
        lost = [n for n in registry.applied if n not in merged and n not in given]
        if lost:
            homes = {n: TRAINED if n in registry.training else FROZEN for n in lost}
            gone = [name for name in dict.fromkeys(homes.values()) if name not in variables]
            what = f"no collection {listed(gone)}" if gone else "nothing of them"
            warn(
                f"the variables have {what}, so the model runs without the adapters "
                f"{listed(lost)}: {WHOLE}. (To run the base model, call it within "
                "model.disable_adapter())"
            )
        if registry.applied:
            self._check_adapters(variables)
        return variables

    def _check_stacked(self, variables: Mapping[str, Any]) -> None:
        """Nothing, if `variables` have all that rows may choose from.

        Raises:
          ConfigError: something is missing, or is not this model's.
        """
        registry, given = self._registry, adapter_trees(variables)
        held = [name for stack in registry.row_stacks for name in stack.held]
        lost = [name for name in held if name not in given and name not in registry.merged]
        if lost and registry.stacks:
            raise ConfigError(f"the variables lack the stacks {listed(lost)} of adapters: {WHOLE}")
        if lost:
            raise ConfigError(
                f"adapter_names chooses from all adapters of the model, and the variables lack "
                f"{listed(lost)}: model.variables have those alone that are applied. Call "
                "model.stack_adapters() first, from where on they have all of them; or "
                "model(..., adapter_names=...), which takes the model's own"
            )
        self._check_adapters(variables)
        if registry.stacks:
            self._table_in(variables)

    def _table_in(self, variables: Mapping[str, Any], *, now: bool = False) -> SlotTable:
        """The table of slots in `variables`.

        Args:
          now: it has to say what the model says of its slots now.

        Raises:
          ConfigError: there is none, or it is another model's.
        """
        held, kept = variables.get(SLOTS), self._collections.slots()
        assert kept is not None
        shapes = {name: np.shape(x) for name, x in kept._asdict().items() if name != "chosen"}
        found = {n: np.shape(x) for n, x in held.items()} if isinstance(held, Mapping) else {}
        if len(found.pop("chosen", (0, 0))) > 1 or found != shapes:
            raise ConfigError(
                f"variables: {SLOTS!r}: expected a dict with 'chosen' and arrays of shapes "
                f"{shapes}, found {shown(held) if held is None else found}: {WHOLE}"
            )
        table = SlotTable(**held)  # type: ignore[arg-type]
        if now and not all(map(np.array_equal, table, stacking.table(self._registry, {}))):
            raise ConfigError(
                f"variables: {SLOTS!r} says otherwise than this model what is in the slots of its "
                "stacks: take model.variables after the last change of its adapters, or load the "
                "adapters here (load_adapter)"
            )
        return table

    def _check_adapters(self, variables: Mapping[str, Any]) -> None:
        """What `variables` have of adapters is this model's, and the bases they need are there."""
        params, merged = self._params_of(variables), self._merged_in(variables)
        for name, tree in adapter_trees(variables).items():
            if name not in self._kept_specs:
                raise ConfigError(
                    f"no adapter named {shown(name)}, whose leaves the variables hold; this model "
                    f"has {listed(sorted(self._kept_specs))}: add it first"
                )
            if not self._registry.stacks:
                check_spec(self._registry.specs[name], variables.get(SPECS, {}))
            check_leaves(name, tree, self._collections.trees[name], merged=name in merged)
            state = state_of(tree)
            if state.layers:
                check_pair(self._registry, self._kept_specs[name], state, variables)
            needed = [self._registry.layers[layer].kernel_path for layer in state.layers]
            lost = [path for path in [*needed, *state.saved] if path not in params]
            if lost:
                raise ConfigError(
                    f"variables: 'params' lack {listed(list(map(dotted, lost)))}, which adapter "
                    f"{name!r} adapts or trains whole: {WHOLE}"
                )

    @property
    def _merged(self) -> tuple[str, ...]:
        """The adapters whose deltas the kernels hold, whenever they were merged."""
        return tuple(sorted(self._registry.merged))

    def _merged_in(self, variables: Mapping[str, Any]) -> tuple[str, ...]:
        """The same of the kernels in `variables`: those of the model, where they do not say."""
        if SPECS not in variables:
            return self._merged
        return tuple(sorted(name for name, known in variables[SPECS].items() if known.merged))

    @property
    def _kept_specs(self) -> Mapping[str, AdapterSpec]:
        """What is known of each tree that is kept: of an adapter, or of a stack of some."""
        registry = self._registry
        if not registry.stacks:
            return registry.specs
        return {stack.name: registry.spec_of_stack(stack) for stack in registry.stacks}

    def _pairs_of(self, variables: Mapping[str, Any]) -> Mapping[str, BasisPair]:
        """The bases in `variables`."""
        return never_trained(variables.get(PAIRS, {}), _TRAINED_ALONE)

    def _params_of(self, variables: Mapping[str, Any]) -> Mapping[Path, Any]:
        """The base model's leaves in `variables` by path."""
        if not isinstance(variables["params"], Mapping):
            raise ConfigError(
                f"variables: 'params': expected a dict, found {shown(variables['params'])}: {WHOLE}"
            )
        return flat(variables["params"])


def _is_gone(array: Any) -> bool:
    """Whether an array was donated to a jitted function, or is a shape that waits for numbers."""
    return is_abstract(array) or (not isinstance(array, jax.core.Tracer) and array.is_deleted())
