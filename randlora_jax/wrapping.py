"""`get_peft_model`: a model of any kind that some front end accepts, with a fresh adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import randlora_jax.front_ends  # noqa: F401 - makes those of the library known
from randlora_jax.core.ways import Apply
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.models.front_end import WrapRules, given_back, register_front_end, wrap
from randlora_jax.models.layer_types import Table
from randlora_jax.models.model import RandLoraModel
from randlora_jax.models.names import Rules

if TYPE_CHECKING:
    import flax.linen
    import flax.nnx

    from randlora_jax.front_ends.linen import LinenRandLora
    from randlora_jax.front_ends.nnx import NnxRandLora

__all__ = ["RandLoraModel", "get_peft_model", "register_front_end"]


@overload
def get_peft_model(
    model: flax.nnx.Module,
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    token_axes: Sequence[str] = (),
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
    optional: Sequence[str] = (),
    sample_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
) -> NnxRandLora: ...
@overload
def get_peft_model(  # type: ignore[overload-cannot-match]  # to our checker flax is Any
    model: flax.linen.Module,
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    token_axes: Sequence[str] = (),
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
    optional: Sequence[str] = (),
    sample_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
) -> LinenRandLora: ...
@overload
def get_peft_model(  # type: ignore[overload-cannot-match]
    model: Any,  # a Hugging Face model, a params pytree, what a user's front end wraps
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    token_axes: Sequence[str] = (),
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
    optional: Sequence[str] = (),
    sample_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
) -> Any: ...
def get_peft_model(
    model: Any,
    config: RandLoraConfig,
    adapter_name: str = "default",
    *,
    apply: Apply = "auto",
    token_axes: Sequence[str] = (),
    rngs: Any = None,
    views: Mapping[str, str] | None = None,
    names: Rules | None = None,
    layer_types: Table | None = None,
    optional: Sequence[str] = (),
    sample_inputs: Any = None,
    autocast_adapter_dtype: bool = True,
) -> Any:
    """Wraps `model` with a fresh RandLoRA adapter; before training it computes what `model` does.

    Args:
      model: a ``flax.nnx.Module`` (its layers are replaced in place, as PEFT does), a
        ``flax.linen`` module bound to its variables, a Hugging Face ``FlaxPreTrainedModel``, or,
        of any other library, a pytree of arrays with the `views` of its kernels.
      config: what to adapt and how.
      apply: how layers apply the adapter: "auto" takes the cheapest exact way for each pass of each
        layer (`RandLoraModel.explain` says which), "factored" and "merged" insist on one. Belongs
        to the run and is never saved.
      token_axes: the mesh axes that split a batch's first axis, where a trace cannot see it
        (automatic axes): what is cheapest depends on the tokens of one device, and each device
        then sums its own tokens' gradient of lambda and gamma (`randlora_jax.core.mesh`).
      rngs: an ``nnx.Rngs`` or a jax key, for ``init_weights=False`` and, in nnx, adapter dropout.
      views: kernel layouts that types do not tell, by regular expressions on layer paths, such as
        ``{"layers/mlp/.*": "s i o"}`` for scanned Dense layers (`KernelLayout`).
      names: rules from module paths to PyTorch's, where they differ (`Names`).
      layer_types: types of layers that this library does not know (`LayerType`).
      optional: regular expressions on the paths of layers that a call of the whole model may pass
        by; any other adapted layer that the first call does not reach is an error.
      sample_inputs: of a linen module, what it is called with: a tuple of arguments, a dict of
        keyword arguments or a `SampleInputs`, which may name another method. It is then run once
        without numbers, and every layer that this reaches tells its type.
      autocast_adapter_dtype: as for `RandLoraModel.add_adapter`.

    Raises:
      ConfigError: `model` or `config` cannot be used.
      TargetError: `config` selects no layer of `model`.
    """
    wrapped = wrap(
        model,
        WrapRules.stated(apply, token_axes, views, names, layer_types, optional, sample_inputs),
    )
    with given_back(wrapped):
        wrapped.add_adapter(
            adapter_name, config, rngs=rngs, autocast_adapter_dtype=autocast_adapter_dtype
        )
    return wrapped
