"""An adapter's dropout in a module: a key of its own for each layer that scans take apart."""

from collections.abc import Sequence

import jax
from flax import nnx

from randlora_jax.interop.errors import ConfigError, listed
from randlora_jax.models.layer import Layer


class StackedStream(nnx.RngStream):
    """A stream with one key for each layer of a stack, shaped as the stack is, for scans to take.

    Drawn from where layers are not apart (in a module that runs all of a stack in one call; after
    ``nnx.split_rngs``, which expects a single key), the first key serves.
    """

    def __call__(self) -> jax.Array:
        """A fresh key."""
        key = jax.random.fold_in(*(x[...].reshape(-1)[0] for x in (self.key, self.count)))
        self.count[...] += 1
        return key


def dropout(rate: float, rngs: nnx.Rngs | None, layers: Sequence[Layer]) -> nnx.Dropout:
    """For the adapter in a module.

    Args:
      rngs: None where nothing is drawn, as long as it is `deterministic`.
      layers: all those whose kernels the module holds.

    Raises:
      ConfigError: they are stacked each along axes of its own.
    """
    found = nnx.Dropout(rate, rngs=rngs)
    if rngs and (shape := _stack_shape(layers)):
        keys = jax.random.split(found.rngs.key[...], shape)
        found.rngs = StackedStream(keys, tag=found.rngs.tag)
    return found


def _stack_shape(layers: Sequence[Layer]) -> tuple[int, ...]:
    """With the stack axes where the kernels have them, as lambda and gamma do; () of no stack.

    Of axes elsewhere than first, those of the kernel around them have extent 1.
    """
    stacks = [_stack_axes(layer) for layer in layers]
    common = dict(set.intersection(*(set(axes.items()) for axes in stacks)))
    if all(stacks) and not common:
        raise ConfigError(
            f"randlora_dropout: the kernels {listed([layer.name for layer in layers])} of one "
            "module are stacked along different axes, so no key of its dropout can be shaped for "
            "a scan over them: set randlora_dropout=0.0, or stack them along the same axis"
        )
    if set(common) == set(range(len(common))):
        return tuple(common[i] for i in range(len(common)))
    return tuple(common.get(i, 1) for i in range(len(layers[0].shape)))


def _stack_axes(layer: Layer) -> dict[int, int]:
    """The axes of a layer's kernel that stack matrices, with their extents."""
    both = zip(layer.layout.axes, layer.shape, strict=True)
    return {i: extent for i, (axis, extent) in enumerate(both) if axis == "s"}
