"""Taking the arrays out of a pytree, so that what is left can be hashed and compared."""

from dataclasses import dataclass
from typing import Any

import jax

Tree = Any


@dataclass(frozen=True)
class Hoisted:
    """A pytree without its arrays.

    Args:
      structure: of the tree.
      others: its leaves in order, each with its type; None in place of an array.
    """

    structure: Any
    others: tuple[tuple[type, Any] | None, ...]

    @classmethod
    def of(cls, tree: Tree, kinds: tuple[type, ...] = (jax.Array,)) -> "tuple[Hoisted, list[Any]]":
        """What of `tree` is no array, and its arrays in order: leaves of one of `kinds`.

        NumPy's arrays are none here: whoever passes one may need its very numbers while tracing.
        """
        leaves, structure = jax.tree.flatten(tree)
        arrays = [x for x in leaves if isinstance(x, kinds)]
        others = [None if isinstance(x, kinds) else (type(x), x) for x in leaves]
        return cls(structure, tuple(others)), arrays

    def with_arrays(self, arrays: list[jax.Array]) -> Tree:
        """The tree with `arrays` in their places."""
        left = iter(arrays)
        leaves = [next(left) if other is None else other[1] for other in self.others]
        return jax.tree.unflatten(self.structure, leaves)


def is_traced(tree: Tree) -> bool:
    """Whether some array of `tree` is being traced."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
