"""The LoRA that a base model came with: frozen while it is wrapped, as all of the base."""

from collections.abc import Iterator

from flax import nnx

from randlora_jax.front_ends.nnx.nested import wrapped_in
from randlora_jax.front_ends.nnx.replacing import replace_held
from randlora_jax.front_ends.nnx.variables import FrozenLoRAParam

_TYPE = "lora_type"  # of what was frozen, among its metadata


def freeze_loras(model: nnx.Module) -> None:
    """Puts a `FrozenLoRAParam` in place of every ``nnx.LoRAParam`` of a model, or what derives.

    A new Variable, since another model may have the same; one for all places that had the same.
    """
    new = {
        id(x): FrozenLoRAParam.from_metadata(x.get_raw_value(), x.get_metadata() | {_TYPE: type(x)})
        for x in _variables(model)
        if isinstance(x, nnx.LoRAParam)
    }
    replace_held(model, new)


def give_back_loras(model: nnx.Module) -> None:
    """The reverse: each of the type that it had, with the value of now."""
    new = {}
    for x in _variables(model):
        if isinstance(x, FrozenLoRAParam):
            metadata = x.get_metadata()
            new[id(x)] = metadata.pop(_TYPE).from_metadata(x.get_raw_value(), metadata)
    replace_held(model, new)


def _variables(model: nnx.Module) -> Iterator[nnx.Variable]:
    """Every Variable of a model, but for those of wrapped models in it."""
    theirs = {
        id(x)
        for whole in wrapped_in(module for _, module in nnx.iter_modules(model))
        for _, x in nnx.iter_graph(whole)
    }
    for _, x in nnx.iter_graph(model):
        if isinstance(x, nnx.Variable) and id(x) not in theirs:
            yield x
