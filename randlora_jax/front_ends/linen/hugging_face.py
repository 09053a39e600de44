"""The front end for Hugging Face's Flax models: linen modules behind an interface of their own."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.core import unfreeze

from randlora_jax.core.abstract import some_abstract
from randlora_jax.front_ends.collections import CollectionStore
from randlora_jax.front_ends.linen.model import InterceptedRandLora, types_with
from randlora_jax.front_ends.linen.tied import tied_modules
from randlora_jax.front_ends.linen.tracing import Trace
from randlora_jax.front_ends.shown_signature import shows_call_of
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.flax_gaps import not_computed
from randlora_jax.models.front_end import WrapRules, register_front_end, warn_of_another_model
from randlora_jax.models.layer_types import LayerTypes, refuse_idle_types
from randlora_jax.models.names import Path
from randlora_jax.models.registry import BaseModelInfo
from randlora_jax.models.slots import RowChoice

# Methods that make params of the base model, or cast them.
_OF_BASE_PARAMS = ("init_weights", "to_bf16", "to_fp16", "to_fp32")
# What their last layer makes are no logits of the tokens that come in, so "all-linear" takes it.
_WITHOUT_OUTPUT_EMBEDDING = ("FlaxWav2Vec2ForCTC", "FlaxBeitForMaskedImageModeling")


class HuggingFaceStore(CollectionStore):
    """The collections of a Hugging Face model, which gets its params back in the end."""

    held = True  # the model holds its params

    def __init__(self, model: Any) -> None:
        try:
            params = unfreeze(model.params)
        except ValueError:  # of a model that was made with _do_init=False, and never holds any
            params = unfreeze(model.params_shape_tree)
            self.held = False
        self.model = model
        # models with batch statistics keep whole collections in .params
        self.nested = "params" in params
        super().__init__(params if self.nested else {"params": params})

    def params_of(self, collections: dict[str, Any]) -> dict[str, Any]:
        """Collections as the model's own ``params`` holds them."""
        return collections if self.nested else collections["params"]

    def release(self) -> Any:
        """The model.

        Raises:
          ConfigError: it holds no params, and there are some.
        """
        if self.held:
            self.model.params = self.params_of(self.base)
        elif not some_abstract(self.base):
            raise ConfigError(
                f"this {type(self.model).__name__} was made with _do_init=False, so it cannot hold "
                "its params: take them from the wrapped model, model.params['params'] (after "
                "model.merge_adapter(), with the adapter in them), and go on with model.model"
            )
        return self.model


@register_front_end(
    "a Hugging Face Flax model",
    accepts=lambda model, rules: (
        not isinstance(model, nn.Module)
        and isinstance(getattr(model, "module", None), nn.Module)
        and hasattr(model, "params_shape_tree")  # of transformers' classes alone
    ),
)
class HuggingFaceRandLora(InterceptedRandLora):
    """A Hugging Face Flax model with adapters: call it, or ``.generate``, as the model itself.

    ``model.params`` holds the collections, and is what ``params=`` takes everywhere; every other
    attribute is the model's own.
    """

    _collections: HuggingFaceStore

    def __init__(self, model: Any, rules: WrapRules) -> None:
        self.model = model
        _warn_of_another_model(model)
        init = functools.partial(model.init_weights, input_shape=model.input_shape)
        trace = Trace(types_with(rules), LayerTypes((rules.layer_types,)))
        trace.initialised(init, model.key)
        refuse_idle_types(rules.layer_types, trace.kinds)
        store = HuggingFaceStore(model)
        info = _info(model, store.base_leaves())
        self._begin(model.module, store, rules, trace, info, {})

    @property
    def _base_name(self) -> str:
        return type(self.model).__name__

    @property
    def params(self) -> dict[str, Any]:
        """Every collection; assign it back after training."""
        return self.variables

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self.variables = params

    @shows_call_of(lambda self: self.model)
    def __call__(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Calls the model.

        Args:
          params: as `self.params`, which is the default.
          adapter_names: an adapter for each row of the batch, by name or as `rows` gives them.
        """
        call = self._with_adapters(self.model.__call__)
        return call(*args, adapter_names=adapter_names, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # __init__ has not run yet, as under copy
            raise AttributeError(name)
        found = getattr(self.model, name)
        if name in _OF_BASE_PARAMS:
            return _refused(found)
        if callable(found) and _takes_params(self.model, name):
            return self._with_adapters(found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the model, where `__getattr__` finds it, if it is none of the wrapper's own."""
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.model, name)

    def _is_own(self, name: str) -> bool:
        return name.startswith("_") or name in ("model", "module") or hasattr(type(self), name)

    def _with_adapters(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the model that takes ``params``, with the adapters joined in."""

        @functools.wraps(method)
        def joined(*args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
            call = inspect.signature(method).bind_partial(*args, **kwargs)
            told = {**call.arguments, **kwargs}
            params = told.get("params")
            given = self._variables_for(adapter_names) if params is None else params
            variables = self._checked(given, adapter_names)
            choice = self._rows_in(variables, adapter_names, _beams(method, told))
            if method.__name__ == "generate":
                _refuse_other_rows(next(iter(_parameters(method))), told, choice)
            call.arguments.pop("params", None)  # what comes after it is given by name, then
            with self._adapting(variables, choice) as whole:
                inner = {**call.kwargs, "params": self._collections.params_of(whole)}
                output = method(*call.args, **inner)
            if method == self.model.__call__:
                self._refuse_unreached(variables)
            return output

        return joined


def _warn_of_another_model(model: Any) -> None:
    """Warn where the Flax class does not compute what the model's configuration asks for."""
    if gaps := not_computed(model.config, type(model).__name__):
        warn_of_another_model(
            model,
            "; ".join(gaps),
            "Take a model that does compute it, such as google-tunix's of flax.nnx "
            "(docs/trainers.md); randlora-jax verify tells whether both compute the same",
        )


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the base model that has no meaning where adapters are."""

    @functools.wraps(method)
    def refused(*args: Any, **kwargs: Any) -> Any:
        name = method.__name__
        raise ConfigError(
            f"{name} gives params of the base model, and model.params hold adapters and bases "
            f"too: call it before wrapping, base.params = base.{name}(...); or now, "
            f"model.model.{name}(...), for what model.params hold of the base model"
        )

    return refused


def _takes_params(model: Any, name: str) -> bool:
    """Whether a method takes ``params``, or hands them on to one that it overrides (Whisper's)."""
    kinds = [vars(kind)[name] for kind in type(model).__mro__ if name in vars(kind)]
    return any("params" in _parameters(method) for method in [getattr(model, name), *kinds])


def _parameters(method: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(method).parameters
    except (TypeError, ValueError):
        return {}


def _beams(method: Callable[..., Any], told: Mapping[str, Any]) -> int:
    """How many rows a search makes of one, one after another, in a call of a model's method.

    Args:
      told: its arguments, by name.
    """
    if method.__name__ != "generate":
        return 1
    config = told.get("generation_config") or method.__self__.generation_config  # type: ignore[attr-defined]
    return int(told.get("num_beams") or config.num_beams or 1)


def _refuse_other_rows(name: str, told: Mapping[str, Any], choice: RowChoice | None) -> None:
    """Nothing, if rows of a batch that is searched choose for themselves, one each, or none does.

    With beams a layer cannot tell a list that is as many times too long.

    Args:
      name: of what the model is called with, such as ``input_ids``.
      told: the arguments, by name.

    Raises:
      ConfigError: the batch has another number of rows.
    """
    if choice is None or choice.rows is None or name not in told:
        return
    size = np.shape(told[name])[0]
    if size != choice.rows:
        raise ConfigError(
            f"adapter_names (or set_rows) has {choice.rows}: expected one name for each row of "
            f"{name}, which has {size}, however many beams each becomes"
        )


def _info(model: Any, paths: Iterable[Path]) -> BaseModelInfo:
    """What PEFT records of a base model, from the names of a Hugging Face Flax class.

    Args:
      paths: of its params.
    """
    name = type(model).__name__
    return BaseModelInfo(
        model_type=model.config.model_type,
        name_or_path=model.config._name_or_path or None,
        auto_mapping={
            "base_model_class": name.removeprefix("Flax"),
            "parent_library": type(model).__module__.replace("modeling_flax_", "modeling_"),
        },
        has_output_head=name not in _WITHOUT_OUTPUT_EMBEDDING,
        has_torch_paths=True,
        tied=tied_modules(name, model.config, paths),
    )
