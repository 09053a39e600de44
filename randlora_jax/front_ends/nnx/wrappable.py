"""What an nnx model must be before it can be wrapped."""

from collections.abc import Iterable

import jax.numpy as jnp
from flax import nnx

from randlora_jax.core.abstract import is_abstract
from randlora_jax.front_ends.nnx.held import held_by, of_jax, of_numpy
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.nested import wrappers_of_wrapped
from randlora_jax.front_ends.nnx.parts import Part
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.front_end import ADAPTED_ALREADY
from randlora_jax.models.layer_types import LayerTypes, absent_kernel
from randlora_jax.models.names import Path, dotted
from randlora_jax.models.quantised import arrays_in


def refuse_part(model: object) -> None:
    """Nothing, if `model` is no part of a wrapped one.

    Raises:
      ConfigError: it is.
    """
    if isinstance(model, Part):
        raise ConfigError(
            f"this is a part of a model that is wrapped already: let target_modules choose layers "
            f"in it. {ADAPTED_ALREADY}"
        )


def make_wrappable(model: nnx.Module, modules: Iterable[tuple[Path, nnx.Module]]) -> None:
    """Puts JAX's arrays where NumPy's are, as `nnx.update` leaves them, and for numbers in Params.

    Args:
      modules: all of `model`, with their paths.

    Raises:
      ConfigError: an earlier wrap replaced layers of this model in place; or a quantised array of
        shapes alone is held by no Variable.
    """
    modules = list(modules)
    # a wrapped model may be a part of another
    theirs = wrappers_of_wrapped(module for _, module in modules)
    adapted = [
        dotted(path)
        for path, module in modules
        if isinstance(module, RandLoraLayer) and id(module) not in theirs
    ]
    if adapted:
        raise ConfigError(
            f"this model was wrapped already, and its layers {listed(adapted, 3)} were replaced in "
            f"place: go on with what get_peft_model gave back then. {ADAPTED_ALREADY}"
        )
    for path, module in modules:
        _refuse_bare_shapes(path, module)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and of_numpy(node):
            node.set_raw_value(of_jax(node))
        if isinstance(node, nnx.Param) and isinstance(node.get_raw_value(), float):
            node.set_raw_value(jnp.asarray(node.get_raw_value()))  # which nnx.jit would do


def _refuse_bare_shapes(path: Path, module: nnx.Module) -> None:
    """Nothing, if every shape that a module holds in an array's place can be filled.

    Raises:
      ConfigError: Variables hold none of a quantised array, and no state of the model has it.
    """
    for leaf, held in held_by(module):
        bare = {} if isinstance(held, nnx.Variable) else arrays_in(held)
        if any(map(is_abstract, bare.values())):
            raise ConfigError(
                f"{dotted((*path, *leaf))!r} is a quantised array of shapes alone, which no "
                "nnx.state has, so that nothing could fill it: hold it in an nnx.Param"
            )


def refuse_absent_kernels(types: LayerTypes, modules: Iterable[tuple[Path, nnx.Module]]) -> None:
    """Nothing, if each of `modules` has the kernel that a user's ``layer_types=`` says it has.

    Raises:
      ConfigError: one has not.
    """
    for path, module in modules:
        known = types.find(module)
        if known and not hasattr(module, known.leaf.partition("/")[0]):
            has = [name for name, x in vars(module).items() if isinstance(x, nnx.Variable)]
            raise absent_kernel(type(module).__name__, path, known.leaf, has)
