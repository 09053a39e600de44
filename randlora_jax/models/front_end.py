"""Front ends make themselves known here: each says which models it accepts and how it wraps them.

@register_front_end(
    "an equinox module", accepts=lambda model, rules: isinstance(model, eqx.Module)
)
class EquinoxRandLora(RandLoraModel): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.interop.errors import ConfigError, listed, warn
from randlora_jax.models.adapted import AdaptedModel
from randlora_jax.models.finding import StatedLayouts
from randlora_jax.models.known_models import KnownModel
from randlora_jax.models.layer_types import Table
from randlora_jax.models.names import Names, Rules


@dataclass(frozen=True)
class WrapRules:
    """What a user says of a model when wrapping it; see `get_peft_model`."""

    options: ExecutionOptions = field(default_factory=ExecutionOptions)
    layouts: StatedLayouts = field(default_factory=lambda: StatedLayouts({}))
    names: Names = field(default_factory=lambda: Names({}))
    layer_types: Table = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    @classmethod
    def stated(
        cls,
        apply: Any,
        token_axes: Sequence[str],
        views: Mapping[str, str] | None,
        names: Rules | None,
        layer_types: Table | None,
        optional: Sequence[str],
    ) -> WrapRules:
        """Of the arguments of `get_peft_model`.

        Raises:
          ConfigError: `apply` or a view is malformed.
        """
        return cls(
            ExecutionOptions(apply, tuple(token_axes)),
            StatedLayouts(views or {}),
            Names(names or {}),
            layer_types or {},
            tuple(optional),
        )

    def beside(self, known: KnownModel) -> WrapRules:
        """The user's rules, and after them those of a model that is known by name."""
        return replace(
            self,
            layouts=StatedLayouts({**self.layouts.rules, **known.layouts}, frozenset(known.layouts)),
            names=Names({**self.names.rules, **known.names}, frozenset(known.names)),
            layer_types={**self.layer_types, **known.layer_types},
        )


Wrap = TypeVar("Wrap", bound="Callable[[Any, WrapRules], AdaptedModel]")


class _FrontEnd(NamedTuple):
    expects: str
    accepts: Callable[[Any, WrapRules], bool]
    wrap: Callable[[Any, WrapRules], AdaptedModel]


_front_ends: list[_FrontEnd] = []


def register_front_end(
    expects: str, *, accepts: Callable[[Any, WrapRules], bool]
) -> Callable[[Wrap], Wrap]:
    """Makes a front end known: decorates a class, or a function, of (model, rules).

    The one that was registered last is asked first.

    Args:
      expects: what it wraps, in words, for messages.
      accepts: whether it wraps a model, under the user's rules.
    """

    def register(wrap: Wrap) -> Wrap:
        _front_ends.append(_FrontEnd(expects, accepts, wrap))
        return wrap

    return register


def wrap(model: Any, rules: WrapRules) -> AdaptedModel:
    """`model` wrapped by the front end that accepts it, with no adapter yet.

    Raises:
      ConfigError: no front end accepts it, or its mesh has no such token axes.
    """
    for front_end in reversed(_front_ends):
        if front_end.accepts(model, rules):
            wrapped = front_end.wrap(model, rules)
            break
    else:
        expected = ", or ".join(front_end.expects for front_end in reversed(_front_ends))
        raise ConfigError(f"cannot wrap a {type(model).__name__}: expected {expected}")
    _warn_of_hidden(model, wrapped)
    mesh, token_axes = wrapped._registry.replicated, rules.options.token_axes
    if not set(token_axes) <= set(mesh.mesh.axis_names if mesh else ()):
        raise ConfigError(
            f"token_axes={token_axes}: the base model lies on "
            f"{f'a mesh with the axes {mesh.mesh.axis_names}' if mesh else 'no mesh'}; put its "
            "arrays on the mesh first (jax.device_put with a NamedSharding), then wrap it"
        )
    return wrapped


def _warn_of_hidden(model: Any, wrapped: AdaptedModel) -> None:
    """Warn of methods of the user's model that the wrapper, which else hands them on, has too."""
    if not hasattr(type(wrapped), "__getattr__"):
        return
    frameworks = ("flax", "jax", "transformers", "builtins", "abc")
    theirs = {
        name
        for kind in type(model).__mro__
        if kind.__module__.split(".")[0] not in frameworks
        for name in vars(kind)
        if not name.startswith("_")
    }
    hidden = sorted(theirs & set(dir(type(wrapped))))
    if hidden:
        warn(
            f"{listed(hidden)} of {type(model).__name__} cannot be reached through the wrapped "
            f"model, whose own {type(wrapped).__name__}.{hidden[0]} comes first: give the model a "
            "method of another name that calls it"
        )
