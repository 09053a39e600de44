"""What a module becomes in a call of a copy of it: seen there, and done to the module itself."""

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any

import jax
from flax import nnx

from randlora_jax.front_ends.call_input import Arguments
from randlora_jax.front_ends.collections import part_of
from randlora_jax.front_ends.nnx.held import raw
from randlora_jax.models.names import Path
from randlora_jax.models.quantised import integers_in

_CAPTURES = "__captures__"  # where flax's modules keep what ``nnx.capture`` is to give


def called(
    graph: nnx.GraphDef[nnx.Module], flat: dict[Path, Any], method: str, arguments: Arguments
) -> tuple[Any, list[Path]]:
    """What a method of a module of such a structure and state returns; and what it changed there.

    Returns:
      What it returns, and where the module is not what it was. What ``nnx.capture`` keeps of the
      result does not count, since it keeps the wrapper's.
    """
    state = nnx.from_flat_state(flat)
    leaves, structure = _flat(state)  # Variables change in place
    module = nnx.merge(graph, state)
    args, kwargs = arguments
    out = getattr(module, method)(*args, **kwargs)
    graph_now, state_now = nnx.split(module)
    leaves_now, structure_now = _flat(state_now)
    alike = structure_now == structure and graph_now == graph
    if alike and all(map(lambda a, b: a is b, leaves_now, leaves)):
        return out, []
    before = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
    changes = renew(before, module)
    return out, [path for path in changes if (path[0], *path[2:3]) != (_CAPTURES, method)]


def renew(here: Any, there: Any, kept: Collection[int] = ()) -> list[Path]:
    """Makes of a module, or of a container, what a copy of it has become.

    What is unchanged is not touched. Attributes are set as the module's own code would set them, so
    that flax refuses what it would refuse there.

    Args:
      there: the copy.
      kept: the ``id`` of each Variable of the copy whose value is not for the module.

    Returns:
      Where it was not what the copy is.
    """
    renewal = _Renewal(kept)
    renewal.of(here, there, ())
    return renewal.changed


class _Renewal:
    """One walk over a module and its copy.

    Args:
      kept: see `renew`.
    """

    def __init__(self, kept: Collection[int]) -> None:
        self.seen, self.changed = set(kept), list[Path]()

    def of(self, here: Any, there: Any, path: Path) -> Any:
        """`here` as `there` is: itself where it can be changed in place."""
        if here is there or id(there) in self.seen:
            return here
        if type(here) is not type(there):
            self.changed.append((*path, *(integers_in(raw(there)) or ())))
            return there
        if isinstance(here, nnx.Variable | nnx.Pytree):
            self.seen.add(id(there))
        if isinstance(here, nnx.Variable):
            self._value(here, there, path)
        elif issubclass(type(here), nnx.List | list):  # no wrapper around one
            self._items(here, there, path)
        elif isinstance(here, nnx.Pytree):
            self._attributes(here, there, path)
        elif isinstance(here, MutableMapping):
            self._keys(here, there, path)
        else:
            return self._parts(here, there, path)
        return here

    def _value(self, here: Any, there: Any, path: Path) -> None:
        mine, theirs = _leaves_of(here), _leaves_of(there)
        names = [*theirs, *(mine.keys() - theirs.keys())]
        changed = [name for name in names if mine.get(name, here) is not theirs.get(name, there)]
        if changed:
            self.changed += [(*path, *name) for name in changed]
            here.set_raw_value(there.get_raw_value())

    def _attributes(self, here: Any, there: Any, path: Path) -> None:
        mine, theirs = _attributes_of(here), _attributes_of(there)
        is_data = vars(there).get("_pytree__nodes", {})
        for name in mine.keys() - theirs.keys():
            self.changed.append((*path, name))
            delattr(here, name)
        for name, value in theirs.items():
            now = self._part(mine, name, value, path)
            if name not in mine or now is not mine[name]:
                setattr(here, name, nnx.data(now) if is_data.get(name) else now)

    def _keys(self, here: Any, there: Any, path: Path) -> None:
        mine = dict(here)
        for key in mine.keys() - there.keys():
            self.changed.append((*path, key))
            del here[key]
        for key, value in there.items():
            now = self._part(mine, key, value, path)
            if key not in mine or now is not mine[key]:
                here[key] = now

    def _items(self, here: Any, there: Any, path: Path) -> None:
        mine = dict(enumerate(here))
        for i in range(len(mine), len(there), -1):
            self.changed.append((*path, i - 1))
            here.pop()
        for i, value in enumerate(there):
            now = self._part(mine, i, value, path)
            if i not in mine:
                here.append(now)
            elif now is not mine[i]:
                here[i] = now

    def _part(self, mine: Mapping[Any, Any], key: Any, value: Any, path: Path) -> Any:
        if key in mine:
            return self.of(mine[key], value, (*path, key))
        self.changed.append((*path, key))
        return value

    def _parts(self, here: Any, there: Any, path: Path) -> Any:
        """Of a pytree that cannot be changed itself, or of a leaf."""
        mine, structure = _flat(here, lambda x: x is not here)
        theirs, now = _flat(there, lambda x: x is not there)
        alike = now == structure
        if not alike or jax.tree_util.all_leaves([there]):
            self.changed.append(path)
            return there
        both = enumerate(zip(mine, theirs, strict=True))
        parts = [self.of(*each, (*path, i)) for i, each in both]
        same = all(map(lambda a, b: a is b, parts, mine))
        return here if same else jax.tree.unflatten(structure, parts)


def _flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Its leaves, and its structure: something that can be compared."""
    return jax.tree.flatten(tree, is_leaf)


def _leaves_of(variable: nnx.Variable[Any]) -> dict[Path, Any]:
    """Of its value, by their paths in it."""
    leaves = jax.tree_util.tree_leaves_with_path(variable.get_raw_value())
    return {tuple(map(part_of, keys)): leaf for keys, leaf in leaves}


def _attributes_of(node: Any) -> dict[str, Any]:
    """What a node of flax's graphs has, without what flax notes of it."""
    return {name: x for name, x in vars(node).items() if not str(name).startswith("_pytree__")}
