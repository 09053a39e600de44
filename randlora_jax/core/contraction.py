"""A layer's call as a sum over axes of its input, so that an adapter can be applied beside it.

What a layer computes is an einsum of its input and its kernel, a letter an axis. With the kernel's
layout (which of its axes are in, out, stack), that tells how to lay the input out as rows of a
matrix, and the rows of a result as the layer's output.
"""

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.interop.errors import ConfigError, shown


@dataclass(frozen=True)
class CallAxes:
    """The axes of one call: of its input, kernel and output, and the kernel's by their role."""

    x: str
    kernel: str
    out: str
    stack: str
    n_in: str
    n_out: str

    @property
    def shared(self) -> str:
        """Stack axes along which every matrix has an input of its own."""
        return "".join(c for c in self.stack if c in self.x)

    @property
    def rows(self) -> str:
        """Axes of the input that the kernel does not have: its tokens."""
        return "".join(c for c in self.x if c not in self.stack + self.n_in)

    def extents(self, x: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, int] | None:
        """Of every axis, from the shapes of both; None where these do not fit each other."""
        if len(self.x) != len(x):
            return None
        held, seen = dict(zip(self.kernel, kernel, strict=True)), dict(zip(self.x, x, strict=True))
        return held | seen if all(held.get(c, n) == n for c, n in seen.items()) else None


@dataclass(frozen=True)
class Contraction:
    """``einsum(equation, x, kernel)``.

    Args:
      equation: with ``...`` for any number of axes, in the input and the output. Without one, the
        layer sums over its input's last axes, in the order of the kernel's in axes, and puts the
        kernel's other axes in their place.

    Raises:
      ConfigError: `equation` is none of two arrays with a result, or a letter is twice in one.
    """

    equation: str | None = None

    def __post_init__(self) -> None:
        if self.equation is None:
            return
        text = self.equation.replace(" ", "") if isinstance(self.equation, str) else ""
        axes = r"[A-Za-z]*(?:\.\.\.)?[A-Za-z]*"
        match = re.fullmatch(rf"({axes}),([A-Za-z]+)->({axes})", text)
        parts = [part.replace(".", "") for part in match.groups()] if match else ["", "", "?"]
        x, kernel, out = parts
        if set(out) - set(x + kernel) or any(len(set(part)) < len(part) for part in parts):
            raise ConfigError(
                "Contraction: expected an einsum of a layer's input and its kernel, such as "
                f"'...i,io->...o', each letter once in each, found {shown(self.equation)}"
            )

    @property
    def parts(self) -> tuple[str, str, str]:
        """The axes of input, kernel and output in the equation, if there is one."""
        x, kernel, out = re.split(",|->", (self.equation or ",->").replace(" ", ""))
        return x, kernel, out

    def fits(self, layout: KernelLayout) -> bool:
        """Whether a layout and the equation mean the same kernel."""
        if self.equation is None:
            return True
        x, kernel, out = self.parts
        meant = {
            "i": set(x) - set(out),
            "o": set(out) - set(x),
            "s": set(out),  # several layers side by side in the output, too
        }
        return len(layout.axes) == len(kernel) and all(
            letter in meant[axis] for axis, letter in zip(layout.axes, kernel, strict=True)
        )

    def parts_for(self, layout: KernelLayout) -> tuple[str, str, str]:
        """`parts`, also where there is no equation."""
        if self.equation is not None:
            return self.parts
        kernel = string.ascii_letters[: len(layout.axes)]
        ins = _of(layout, kernel, "i")
        return f"...{ins}", kernel, "..." + "".join(c for c in kernel if c not in ins)

    def axes(self, layout: KernelLayout, ndim: int) -> CallAxes:
        """The axes of a call whose input has `ndim`, of a layer whose kernel has `layout`."""
        x, kernel, out = self.parts_for(layout)
        free = [c for c in string.ascii_letters if c not in x + kernel + out]
        dots = "".join(free[: max(0, ndim - len(x.replace("...", "")))])
        x, out = x.replace("...", dots), out.replace("...", dots)
        return CallAxes(x, kernel, out, *(_of(layout, kernel, side) for side in "sio"))

    def input_of(self, layout: KernelLayout, shape: tuple[int, ...]) -> str:
        """The shape of an input, for a message, that a kernel of `shape` takes."""
        x, kernel, _ = self.parts_for(layout)
        held = dict(zip(kernel, shape, strict=True))
        return f"({', '.join(str(held.get(c, c)) for c in re.findall(r'[.]{3}|.', x))})"


LAST_AXES = Contraction()


def _of(layout: KernelLayout, kernel: str, side: str) -> str:
    return "".join(c for c, role in zip(kernel, layout.axes, strict=True) if role == side)


def as_rows(x: jax.Array, axes: CallAxes) -> jax.Array:
    """A layer's input as (*shared stack, rows..., in)."""
    order = axes.shared + axes.rows + axes.n_in
    laid = jnp.transpose(x, [axes.x.index(c) for c in order])
    lead = laid.ndim - len(axes.n_in)
    return laid.reshape(*laid.shape[:lead], math.prod(laid.shape[lead:]))  # of no rows, too


def as_output(y: jax.Array, axes: CallAxes, sizes: Sequence[int]) -> jax.Array:
    """(*stack, rows..., out) as the layer lays its output out; `sizes` of the out axes."""
    order = axes.stack + axes.rows + axes.n_out
    whole = y.reshape(*y.shape[:-1], *sizes)
    return jnp.transpose(whole, [order.index(c) for c in axes.out])


def for_each_matrix(
    apply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], axes: CallAxes
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(rows, lambda, gamma) -> result, for every matrix of a stack."""
    for axis in reversed(axes.stack):
        apply = jax.vmap(apply, (0 if axis in axes.x else None, 0, 0))
    return apply
