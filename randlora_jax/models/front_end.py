"""Front ends make themselves known here: each says which models it accepts and how it wraps them.

@register_front_end(
    "an equinox module", accepts=lambda model, rules: isinstance(model, eqx.Module)
)
class EquinoxRandLora(RandLoraModel): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar, cast

from randlora_jax.core.ways import ExecutionOptions
from randlora_jax.interop.errors import ConfigError, listed, shown, warn
from randlora_jax.interop.expressions import fault
from randlora_jax.models.adapted import AdaptedModel
from randlora_jax.models.finding import StatedLayouts
from randlora_jax.models.known_models import KnownModel
from randlora_jax.models.layer import LayerType
from randlora_jax.models.layer_types import Table
from randlora_jax.models.names import Names, Rules
from randlora_jax.models.sample_inputs import SampleInputs


@dataclass(frozen=True)
class WrapRules:
    """What a user says of a model when wrapping it; see `get_peft_model`."""

    options: ExecutionOptions = field(default_factory=ExecutionOptions)
    layouts: StatedLayouts = field(default_factory=lambda: StatedLayouts({}))
    names: Names = field(default_factory=lambda: Names({}))
    layer_types: Table = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    sample_inputs: SampleInputs | None = None

    @classmethod
    def stated(
        cls,
        apply: Any,
        token_axes: Sequence[str],
        views: Mapping[str, str] | None,
        names: Rules | None,
        layer_types: Table | None,
        optional: Sequence[str],
        sample_inputs: Any,
    ) -> WrapRules:
        """Of the arguments of `get_peft_model`.

        Raises:
          ConfigError: one of them is malformed.
        """
        if isinstance(token_axes, str) or not _all_text(token_axes, Sequence):
            raise ConfigError(
                "token_axes: expected a sequence of names of mesh axes, such as ['data'], found "
                f"{shown(token_axes)}"
            )
        return cls(
            ExecutionOptions(apply, tuple(token_axes)),
            StatedLayouts(_rules("views", views, "'s i o'")),
            stated_names(names),
            _types(layer_types),
            _expressions("optional", optional),
            SampleInputs.of(sample_inputs),
        )

    def beside(self, known: KnownModel) -> WrapRules:
        """The user's rules, and after them those of a model that is known by name.

        A rule of the user's with the very key of a known one takes its place.
        """
        layouts = _untaken(known.layouts, self.layouts.rules)
        names = _untaken(known.names, self.names.rules)
        return replace(
            self,
            layouts=StatedLayouts({**self.layouts.rules, **layouts}, frozenset(layouts)),
            names=Names({**self.names.rules, **names}, frozenset(names)),
            layer_types={**known.layer_types, **self.layer_types},
        )


_Meant = TypeVar("_Meant")


def _untaken(known: Mapping[str, _Meant], stated: Mapping[str, _Meant]) -> dict[str, _Meant]:
    """The known rules whose keys the user did not take."""
    return {rule: meant for rule, meant in known.items() if rule not in stated}


def _all_text(value: Any, kind: Any) -> bool:
    """Whether `value` is of `kind` and holds strings alone."""
    return isinstance(value, kind) and all(isinstance(item, str) for item in value)


def _rules(argument: str, rules: Any, example: str, *, lists: bool = False) -> Mapping[str, Any]:
    """Rules on paths, an argument of `get_peft_model`; none for None.

    Args:
      lists: whether a rule may have several strings.

    Raises:
      ConfigError: they are no dict from regular expressions to strings.
    """
    rules = {} if rules is None else rules
    if not _all_text(rules, Mapping):
        raise ConfigError(
            f"{argument}: expected a dict from regular expressions on paths, such as "
            f"{{'layers/mlp/.*': {example}}}, found {shown(rules)}"
        )
    for rule, meant in rules.items():
        if wrong := fault(rule):
            raise ConfigError(f"{argument}: {shown(rule)} is no regular expression: {wrong}")
        if not isinstance(meant, str) and not (lists and meant and _all_text(meant, Sequence)):
            raise ConfigError(
                f"{argument}: {shown(rule)}: expected a string such as {example}, found "
                f"{shown(meant)}"
            )
    return cast(Mapping[str, Any], rules)


def stated_names(names: Any) -> Names:
    """The argument `names` of `get_peft_model` and `save_pretrained`; no rules for None.

    Raises:
      ConfigError: it is no dict from regular expressions to names or lists of names.
    """
    return Names(_rules("names", names, "'model.layers.{}.mlp.up_proj'", lists=True))


def _expressions(argument: str, rules: Any) -> tuple[str, ...]:
    """Regular expressions on paths, an argument of `get_peft_model`.

    Raises:
      ConfigError: they are no sequence of regular expressions.
    """
    if isinstance(rules, str) or not _all_text(rules, Sequence):
        raise ConfigError(
            f"{argument}: expected a sequence of regular expressions on paths, such as "
            f"['vision/.*'], found {shown(rules)}"
        )
    return tuple(_rules(argument, {rule: rule for rule in rules}, ""))


def _types(table: Any) -> Table:
    """The argument `layer_types` of `get_peft_model`; none for None.

    Raises:
      ConfigError: it is no dict, or says of something what is no LayerType.
    """
    table = {} if table is None else table
    sound = isinstance(table, Mapping) and all(
        isinstance(kind, type | str) and (isinstance(known, LayerType) or callable(known))
        for kind, known in table.items()
    )
    if not sound:
        raise ConfigError(
            "layer_types: expected a dict from types of layers to what is known of them, such as "
            f"{{MyDense: LayerType(KernelLayout('i o'))}}, found {shown(table)}"
        )
    return cast(Table, table)


Wrap = TypeVar("Wrap", bound="Callable[[Any, WrapRules], AdaptedModel]")


class _FrontEnd(NamedTuple):
    expects: str
    accepts: Callable[[Any, WrapRules], bool]
    wrap: Callable[[Any, WrapRules], AdaptedModel]


_front_ends: list[_FrontEnd] = []

ADAPTED_ALREADY = (
    "To put another adapter beside what is there, call model.add_adapter(name, config) or "
    "model.load_adapter(directory, name); to begin anew, wrap what model.unload() gives back (or "
    "model.merge_and_unload(), which keeps the adapter's effect)"
)


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
      ConfigError: it is wrapped already, no front end accepts it, or its mesh has no such token
        axes.
    """
    if isinstance(model, AdaptedModel):
        raise ConfigError(
            f"this model is wrapped already: a {type(model).__name__} with the adapters "
            f"{listed(list(model._registry.specs))}. {ADAPTED_ALREADY}"
        )
    for front_end in reversed(_front_ends):
        if front_end.accepts(model, rules):
            wrapped = front_end.wrap(model, rules)
            break
    else:
        expected = ", or ".join(front_end.expects for front_end in reversed(_front_ends))
        raise ConfigError(f"cannot wrap a {type(model).__name__}: expected {expected}")
    if rules.sample_inputs is not None and not wrapped.takes_sample_inputs:
        raise ConfigError(
            f"sample_inputs: a {type(model).__name__} tells its layers without a call; they are "
            "for a flax.linen module bound to its variables"
        )
    _warn_of_hidden(model, wrapped)
    layers, token_axes = wrapped._registry.layers.values(), rules.options.token_axes
    meshes = {layer.sharding.mesh for layer in layers if layer.sharding}
    axes = meshes.pop().axis_names if len(meshes) == 1 else ()
    if not set(token_axes) <= set(axes):
        raise ConfigError(
            f"token_axes={token_axes}: the base model lies on "
            f"{f'a mesh with the axes {axes}' if axes else 'no mesh'}; put its "
            "arrays on the mesh first (jax.device_put with a NamedSharding), then wrap it"
        )
    return wrapped


def warn_of_another_model(model: Any, differs: str, way_out: str = "") -> None:
    """Warn where a model does not compute what its configuration asks for."""
    warn(
        f"{type(model).__name__} does not compute what its config asks for: {differs}. So it is "
        "another model than PyTorch's, and an adapter trained on one of them is wrong on the "
        f"other. {way_out}".rstrip()
    )


@contextmanager
def given_back(wrapped: AdaptedModel) -> Iterator[None]:
    """If what is done within fails, the base model is what it was before it was wrapped."""
    try:
        yield
    except BaseException:
        wrapped._store.release()
        raise


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
    ours = {name: getattr(type(wrapped), name) for name in theirs & set(dir(type(wrapped)))}
    # nnx.tabulate leaves what a class inherits in the class itself
    hidden = sorted(name for name, x in ours.items() if x is not getattr(type(model), name))
    if hidden:
        warn(
            f"{listed(hidden)} of {type(model).__name__} cannot be reached through the wrapped "
            f"model, whose own {type(wrapped).__name__}.{hidden[0]} comes first: give the model a "
            "method of another name that calls it"
        )
