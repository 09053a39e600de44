"""Types of layers: where each keeps its kernel and how that forms matrices.

Every front end has a table of the types it knows; ``get_peft_model(layer_types=...)`` adds a
user's own:

    class MyDense(nnx.Module):          # y = x @ self.weights
        ...

    known = LayerType(KernelLayout("i o"), leaf="weights")
    get_peft_model(model, config, layer_types={MyDense: known})
"""

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from randlora_jax.core.contraction import Contraction
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.interop.errors import ConfigError, listed, shown
from randlora_jax.models.layer import LayerType
from randlora_jax.models.names import Path, dotted

# A type, or its full name where importing it is not ours to do; what it is, or how to tell.
Table = Mapping[type | str, LayerType | Callable[[Any], LayerType | None]]
Told = TypeVar("Told")


def look_up(table: Mapping[Any, Told], kind: type) -> Told | None:
    """What a table has on a class itself, under the class or its full name."""
    return table.get(kind) or table.get(f"{kind.__module__}.{kind.__qualname__}")


@dataclass(frozen=True, eq=False)
class LayerTypes:
    """Tables to look a layer up in, the first one first."""

    tables: tuple[Table, ...]

    def find(self, module: Any) -> LayerType | None:
        """What is known of a layer's type, or of the nearest type it derives from.

        A type that calls itself otherwise than the one it derives from may compute anything.
        """
        for kind in type(module).__mro__:
            for table in self.tables:
                known = look_up(table, kind)
                found = known(module) if callable(known) else known
                if not isinstance(found, LayerType | None):
                    raise ConfigError(
                        f"layer_types: what tells of a {kind.__name__} gave {shown(found)}: "
                        "expected a LayerType, or None"
                    )
                if found is not None:
                    same = type(module).__call__ is kind.__call__
                    return found if same else replace(found, call=None)
        return None


def refuse_idle_types(table: Table, kinds: Iterable[type]) -> None:
    """Nothing, if each type in a user's `table` is one of `kinds`, or one that these derive from.

    Raises:
      ConfigError: one is not.
    """
    every = {base for kind in kinds for base in kind.__mro__}
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in every}
    for key in table:
        if key not in every and key not in known:
            name = key if isinstance(key, str) else key.__name__
            raise ConfigError(
                f"layer_types: no module of this model is a {name}; its types are "
                f"{listed(sorted({kind.__name__ for kind in kinds}))}"
            )


def absent_kernel(kind: str, path: Path, leaf: str, has: Iterable[str]) -> ConfigError:
    """What to say where a user's ``layer_types=`` names a kernel that a module lacks.

    Args:
      kind: the module's class.
      leaf: the kernel, as the user names it.
      has: names of the arrays that the module has.
    """
    return ConfigError(
        f"layer_types says that a {kind} keeps its kernel in {leaf!r}; the one at "
        f"{dotted(path)!r} has {listed(list(has)) or 'no array'}: name the one that is, "
        "LayerType(layout, leaf=...) or of_einsum(equation, leaf=...)"
    )


def of_axes(n_in: int, n_out: int, axes: tuple[int, ...], batch: int = 0) -> LayerType:
    """A layer that sums over `axes` of its input, with `batch` leading kernel axes for as many.

    The kernel has n_in axes for the input, in the order of `axes`, then n_out for the output.
    """
    layout = KernelLayout("s" * batch + "i" * n_in + "o" * n_out)
    if not batch and axes == tuple(range(-n_in, 0)):
        return LayerType(layout)
    if min(axes) < 0 <= max(axes):
        return LayerType(layout, None)  # which axes of the input they are, its rank decides
    kernel, spare = string.ascii_lowercase[: len(layout.axes)], string.ascii_uppercase
    named = dict(enumerate(kernel[:batch])) | dict(zip(axes, kernel[batch:], strict=False))
    left = "".join(named.get(i, spare[i]) for i in range(max(named) + 1))
    right = "".join(named.get(i, spare[i]) for i in range(min(named), 0))
    x = f"{left}...{right}"
    rows = "".join(c for c in x if c not in kernel)
    out = kernel[:batch] + rows + kernel[batch + n_in :]
    return LayerType(layout, Contraction(f"{x},{kernel}->{out}"))


def of_einsum(equation: str, leaf: str = "kernel") -> LayerType:
    """A layer that computes ``einsum(equation, x, kernel)``.

    A letter of the kernel is "in" where the sum runs over it, "out" where only the result has it
    besides, and stacks matrices where x has it, too. (Some kernels hold several PyTorch layers
    along what looks like an out axis: state a layout with ``s`` there.)

    Raises:
      ConfigError: it is no such equation, or a letter of the kernel is in neither x nor the result.
    """
    contraction = Contraction(equation)
    x, kernel, out = contraction.parts
    kinds = {(True, False): "i", (False, True): "o", (True, True): "s"}
    try:
        axes = "".join(kinds[letter in x, letter in out] for letter in kernel)
    except KeyError:
        raise ConfigError(
            f"einsum {equation!r} sums over an axis that its kernel alone has: such a layer "
            "cannot be adapted; leave it out of target_modules"
        ) from None
    # what else it sums over would have to be summed beside, too
    call = contraction if set(x) - set(kernel) <= set(out) else None
    return LayerType(KernelLayout(axes), call, leaf=leaf)
