"""Names: where a leaf lives in a Flax model, and what PyTorch calls it.

Every module has one canonical name, its PyTorch module path; PEFT's target fields match it. Flax
and PyTorch twins share attribute names, so the default is the Flax path with dots.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from randlora_jax.interop.errors import TargetError
from randlora_jax.interop.keys import is_path

Path = tuple[Any, ...]
Rules = Mapping[str, str | Sequence[str]]

# Flax leaf -> PyTorch parameter. Only kernels change their layout.
TORCH_LEAF = {
    "kernel": "weight",
    "w": "weight",  # tunix
    "scale": "weight",
    "embedding": "weight",
    "input_embedding": "weight",  # tunix
    "weight": "weight",  # Equinox, in PyTorch's layout
    "bias": "bias",
    "b": "bias",  # Haiku
}


EMBEDDINGS = ("embedding", "input_embedding")
# Arrays that are their module's one kernel, by their name.
KERNEL_LEAVES = ("kernel", "w", "weight")


def dotted(path: Path) -> str:
    """The canonical name of a module at `path`."""
    return ".".join(map(str, path))


def slashed(path: Sequence[Any]) -> str:
    """`path` as users' rules see it."""
    return "/".join(map(str, path))


@dataclass(frozen=True)
class Names:
    r"""Rules from the path of a JAX module to its canonical name, where the two differ.

    A rule's key is a regular expression that must match a whole path (``/`` between its parts);
    its value is the name, with ``\1`` for the expression's groups and ``{}`` for the index along
    each stack axis (``{1}`` and ``{0}`` for two of them the other way round); slashes become dots.
    A kernel that holds the matrices of several PyTorch modules takes a list of names, in the order
    of its last stack axis:

        {r"layers/(\d+)/attn/q_proj": r"model.layers.\1.self_attn.q_proj",
         r"blocks/mlp/up": "model.layers.{}.mlp.up_proj",
         r"layers/(\d+)/attn/kv": [r"model.layers.\1.self_attn.k_proj",
                                    r"model.layers.\1.self_attn.v_proj"]}
    """

    rules: Rules
    known: frozenset[str] = frozenset()  # those of a known model's table, which need not match

    def rules_of(self, path: Path) -> list[str]:
        """The rules that match `path`; the first one names what is there."""
        return [rule for rule in self.rules if re.fullmatch(rule, slashed(path))]

    def has_rule(self, path: Path, stack: tuple[int, ...] = ()) -> bool:
        """Whether a rule names the module at `path`, and the places of its stack's indices."""
        return self._told(path, stack) is not None

    def _told(self, path: Path, stack: tuple[int, ...]) -> tuple[str, list[str]] | None:
        """The rule that names the module at `path`, and what it gives, ``{}`` still in it.

        None where no rule does, or it says that a stack is called as it is here.
        """
        joined = slashed(path)
        for rule, names in self.rules.items():
            if match := re.fullmatch(rule, joined):
                templates = [names] if isinstance(names, str) else names
                given = [_expanded(rule, match, template) for template in templates]
                return None if stack and given == [dotted(path)] else (rule, given)
        return None

    def of(self, path: Path, stack: tuple[int, ...] = ()) -> tuple[str, ...]:
        """Canonical names of the module at `path`: one for each matrix of its stack.

        Where no rule names them, or one gives the path as it is, a stack's indices come before the
        last part of its path, or after it, if that is an index itself.

        Raises:
          TargetError: a rule gives what cannot be a name, or names more or fewer matrices than the
            kernel holds.
        """
        told = self._told(path, stack)
        if told is None:
            return tuple(by_default(path, index) for index in np.ndindex(*stack))
        rule, given = told
        outer = stack if isinstance(self.rules[rule], str) else stack[:-1]
        found = tuple(_numbered(rule, name, i) for i in np.ndindex(*outer) for name in given)
        if len(set(found)) != math.prod(stack):
            raise _misfit(rule, path, stack, len(set(found)))
        return found

    def first(self, path: Path) -> str:
        """A canonical name of the module at `path`: the first where it stacks several."""
        joined = slashed(path)
        for pattern, names in self.rules.items():
            match = re.fullmatch(pattern, joined)
            if match:
                template = names if isinstance(names, str) else names[0]
                return re.sub(r"\{\d*\}", "0", _expanded(pattern, match, template))
        return dotted(path)


def by_default(path: Path, index: Sequence[Any]) -> str:
    """The name of one matrix of a stack that no rule names."""
    at = -1 if len(path) > 1 and not str(path[-1]).isdigit() else len(path)
    return dotted((*path[:at], *index, *path[at:]))


def _misfit(pattern: str, path: Path, stack: tuple[int, ...], given: int) -> TargetError:
    """A rule gives a stack more or fewer names than it holds matrices."""
    example = {slashed(path): by_default(path, ["{}"] * len(stack))}
    return TargetError(
        f"names rule {pattern!r} gives the {math.prod(stack)} matrices {stack} of "
        f"{slashed(path)!r} {'one name' if given == 1 else f'{given} names'}: write {{}} for each "
        f"stack index, such as names={example}, and a list of names for the last stack axis where "
        "it holds different modules"
    )


def _expanded(pattern: str, match: re.Match[str], template: str) -> str:
    """The name that a rule gives, ``{}`` still in it."""
    try:
        name = match.expand(template).replace("/", ".")
    except (re.error, IndexError) as error:
        raise TargetError(
            f"names rule {pattern!r}: {template!r} cannot be filled in ({error}): it may refer to "
            "the groups of the expression alone"
        ) from None
    if not is_path(name) and (name or match.string):  # the model itself has none
        raise TargetError(
            f"names rule {pattern!r} gives {name!r}, which is no PyTorch module path that a file "
            "could hold: join printable parts by single dots, as in 'model.layers.0.mlp', none of "
            "them with 'randlora_' in it"
        )
    return name


def _numbered(pattern: str, name: str, index: tuple[int, ...]) -> str:
    """A name with the index along each stack axis in it."""
    if not index and "{" in name:
        raise TargetError(
            f"names rule {pattern!r} gives {name!r}, but no kernel tells what stack the braces "
            "stand for: name a single layer without them, and leave what is no linear layer of a "
            "scan, such as its norms, out of modules_to_save"
        )
    try:
        return name.format(*index)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f"names rule {pattern!r} gives {name!r}, whose braces cannot be filled in with the "
            f"indexes {index} of a stack ({error}): write {{}} for each stack axis"
        ) from None
