"""What an nnx model must be before it can be wrapped."""

from collections.abc import Iterable

from flax import nnx

from randlora_jax.front_ends.nnx.held import of_jax, of_numpy
from randlora_jax.front_ends.nnx.layer import RandLoraLayer
from randlora_jax.front_ends.nnx.nested import wrappers_of_wrapped
from randlora_jax.front_ends.nnx.parts import Part
from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.front_end import ADAPTED_ALREADY
from randlora_jax.models.names import Path, dotted


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
    """Puts JAX's arrays where NumPy's are, as `nnx.update` leaves them.

    Args:
      modules: all of `model`, with their paths.

    Raises:
      ConfigError: an earlier wrap replaced layers of this model in place.
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
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and of_numpy(node):
            node.set_raw_value(of_jax(node))
