"""Rules of a user that decide nothing are errors: those that match nothing or come too late."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from randlora_jax.interop.errors import ConfigError, nearest
from randlora_jax.models.layer import Layer
from randlora_jax.models.names import Path, slashed


def refuse_idle(argument: str, rules: Iterable[str], paths: Iterable[Path]) -> None:
    """Nothing, if each of `rules` matches a path."""
    known = list(dict.fromkeys(map(slashed, paths)))
    for rule in rules:
        if not any(re.fullmatch(rule, path) for path in known):
            raise ConfigError(
                f"{argument}: the rule {rule!r} matches nothing in this model; "
                f"near it are {nearest(rule, known)}. A rule is a regular expression on a whole "
                "path, with '/' between its parts"
            )


def refuse_unused_views(views: Mapping[str, str], layers: Iterable[Layer]) -> None:
    """Nothing, if each of `views`, which match something, is about a kernel.

    Raises:
      ConfigError: one is about other arrays alone, or about some that its axes do not fit.
    """
    kernels = list({slashed(path): 0 for x in layers for path in (x.path, x.kernel_path)})
    for rule, axes in views.items():
        if not any(re.fullmatch(rule, path) for path in kernels):
            raise ConfigError(
                f"views: no array that the rule {rule!r} matches is a kernel of the axes {axes!r}, "
                f"with a letter for each; kernels near it are {nearest(rule, kernels)}"
            )
    refuse_shadowed("views", views, (_views_of(x, views) for x in layers))


def _views_of(layer: Layer, views: Mapping[str, str]) -> list[str]:
    """The rules of `views` about a layer: first the one that it goes by."""
    paths = slashed(layer.path), slashed(layer.kernel_path)
    about = [rule for rule in views if any(re.fullmatch(rule, path) for path in paths)]
    return [rule for rule in (layer.view,) if rule] + [rule for rule in about if rule != layer.view]


def refuse_shadowed(argument: str, said: Mapping[str, Any], rules: Iterable[Sequence[str]]) -> None:
    """Nothing, if each of a user's rules is gone by somewhere, or says what is gone by.

    Args:
      said: what the user's rules say.
      rules: those about one thing, in turn: first the one that it goes by.

    Raises:
      ConfigError: others come before a rule, wherever it matches.
    """
    gone_by: set[str] = set()
    before: dict[str, str] = {}
    for first, *others in filter(None, rules):
        gone_by.add(first)
        before |= {rule: first for rule in others if said.get(rule) != said.get(first)}
    for rule in said:
        if rule in before and rule not in gone_by:
            raise ConfigError(
                f"{argument}: the rule {rule!r} decides nothing: whatever it matches, "
                f"{before[rule]!r} matches before it. The first rule that matches counts: put "
                f"{rule!r} before {before[rule]!r}, or leave it out"
            )
