"""One adapted layer, whatever framework it lives in.

A front end hands over `run`, which is the untouched layer as a function of its kernel; this module
decides how the adapters join in and does it. Three ways are exact:

- *joined*: run the layer once with kernel W + delta. Works for every layer type.
- *beside*: add dropout(x) @ delta to the layer's output, in float32. Needs the layer to be a sum
  over axes of its input (`contraction`). It takes the place of *joined* under adapter dropout (the
  base layer must see x as it is) and in a low-precision layer, where a small delta would drown in
  the rounding of W.
- *factored*: the same with delta left in its factors.

Which one runs is decided for each pass on its own (`cost`, `passes`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from randlora_jax.core.bases import Bases, BasisIdentity, Box
from randlora_jax.core.contraction import Contraction, Letters, as_output, as_rows, for_each_matrix
from randlora_jax.core.cost import Apply, cheapest
from randlora_jax.core.delta import Term, delta, through_delta, through_factors
from randlora_jax.core.kernel_layout import View
from randlora_jax.core.mesh import Layout, layout_of, off_mesh
from randlora_jax.core.passes import Way, each_pass_its_way
from randlora_jax.interop.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """A linear layer an adapter can take.

    Args:
      name: its path in the JAX model, dotted.
      path: the same path, in parts.
      view: how its kernel forms matrices.
      shape: of the kernel.
      fan_in_fan_out: its PyTorch twin is a Conv1D, which holds (in, out).
      stated: the user gave the view; else the layer's type did.
      names: canonical names, PyTorch module paths: one for each matrix of the kernel, in the order
        of its stack axes. A stack that no rule names has one name for all.
      leaf: the kernel's name in the layer.
      sharding: of the kernel when its model was wrapped; None if it lay on no mesh.
    """

    name: str
    path: tuple[Any, ...]
    view: View
    shape: tuple[int, ...]
    fan_in_fan_out: bool = False
    stated: bool = False
    names: tuple[str, ...] = ()
    leaf: str = "kernel"
    sharding: NamedSharding | None = None

    @property
    def kernel_path(self) -> tuple[Any, ...]:
        """Where the kernel lies in the model."""
        return (*self.path, self.leaf)

    @property
    def stack(self) -> tuple[int, ...]:
        """Extents of the axes that stack layers; () for a single one."""
        return self.view.sizes(self.shape)[0]

    def split(self, arrays: np.ndarray) -> dict[str, np.ndarray]:
        """(*stack, ...) by canonical name, without the stack axes; whole if it is unnamed."""
        if len(self.names) != math.prod(self.stack):
            return dict.fromkeys(self.names, arrays)
        inner = arrays.shape[len(self.stack) :]
        return dict(zip(self.names, arrays.reshape(-1, *inner), strict=True))

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The reverse of `split`."""
        if not self.stack:
            return arrays[self.names[0]]
        stacked = np.stack([arrays[name] for name in self.names])
        return stacked.reshape(*self.stack, *stacked.shape[1:])

    @property
    def matrix(self) -> tuple[int, int]:
        """(in, out) of one layer."""
        return self.view.sizes(self.shape)[1:]


@dataclass(frozen=True)
class AdapterSpec:
    """What a layer must know of an adapter and cannot train: all static under ``jit``.

    scaling: alpha / r, times what the product of two integers of ternary bases stands for.
    """

    name: str
    scaling: float
    dropout: float
    identity: BasisIdentity
    box: Box  # extents of PEFT's pair for this adapter's own targets


@dataclass(frozen=True)
class How:
    """How layers apply their adapters.

    Args:
      apply: "auto" takes the cheapest exact way of each pass; the others insist.
      token_axes: the mesh axes that split a batch, where a trace cannot see it.
    """

    apply: Apply = "auto"
    token_axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """One active adapter's contribution to one call."""

    term: Term
    drop: Callable[[jax.Array], jax.Array] | None = None


Run = Callable[..., jax.Array]
Parts = Sequence[Part]
Terms = Sequence[Term]
# kernel, input, what each adapter sees of it if it drops some, what else `run` reads
Arguments = tuple[jax.Array, jax.Array, Sequence[jax.Array | None], Sequence[jax.Array]]


def dropout(rate: float, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """``torch.nn.Dropout``'s: zero with probability `rate`, else x / (1 - rate)."""

    def drop(x: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))

    return drop


def adapted(
    run: Run,
    kernel: jax.Array,
    x: jax.Array,
    parts: Parts,
    view: View,
    *,
    call: Contraction | None,
    low_precision: bool,
    how: How,
    layer: Layer,
) -> jax.Array:
    """The layer's output with all `parts` joined in.

    Args:
      run: (kernel, x) -> output of the untouched layer, bias and dtype rules included.
      kernel: as the layer holds it, in the layout of `view`.
      x: the layer's input.
      parts: the active adapters' shares.
      call: the layer as a sum over axes of x; None where it is anything else.
      low_precision: the layer multiplies in less than float32.
      how: the user's word on it.
      layer: what is known of it apart from the call.

    Raises:
      ConfigError: the way asked for is impossible for this layer.
    """
    _, n_in, n_out = view.sizes(kernel.shape)
    dropped = any(part.drop for part in parts)
    if call is None and (dropped or how.apply == "factored"):
        asked = "adapter dropout" if dropped else "apply=factored"
        raise ConfigError(
            f"layer {layer.name!r} is not known to be a sum over axes of its input and can only "
            f"run merged, so {asked} is impossible there: say what it computes with "
            "layer_types={...: LayerType(view, Contraction(equation))}, leave it out of "
            "target_modules, or set randlora_dropout=0 and apply='auto'"
        )
    joins = call is None or (not dropped and (not low_precision or how.apply == "merged"))
    letters = call.letters(view, x.ndim) if call else None
    layout, tokens = layout_of(kernel, view, layer.sharding), x.size // n_in
    if letters:
        tokens = math.prod(x.shape[letters.x.index(axis)] for axis in letters.rows)
        layout = layout and layout.of_rows(as_rows(x, letters), len(letters.shared), how.token_axes)
    split = layout.size(layout.tokens) if layout else 1
    plan = cheapest(
        max(1, tokens // split),
        n_in,
        n_out,
        sum(math.prod(part.term.lam.shape[-2:]) for part in parts),
        joins=joins,
        factors=call is not None,
        apply=how.apply,
        shards=layout.size((*layout.n_in, *layout.n_out)) if layout else 1,
    )
    seen = [part.drop(x) if part.drop else None for part in parts]
    run, carried = jax.closure_convert(run, kernel, x)

    def joined(arguments: Arguments, terms: Terms) -> jax.Array:
        kernel, x, _, carried = arguments
        whole = kernel.astype(jnp.float32) + kernel_delta(terms, view, kernel.shape, layout)
        # formed in float32 and rounded once to what the layer holds
        return run(whole.astype(kernel.dtype), x, *carried)

    def beside(letters: Letters, factored: bool) -> Way:
        through = partial(
            through_matrices,
            view=view,
            shape=kernel.shape,
            letters=letters,
            layout=layout,
            flat=layer.sharding is None and off_mesh(x),
        )

        def way(arguments: Arguments, terms: Terms) -> jax.Array:
            kernel, x, seen, carried = arguments
            out = run(kernel, x, *carried)
            total = out.astype(jnp.float32)
            for term, dropped in zip(terms, seen, strict=True):
                total = total + through(x if dropped is None else dropped, term, factored)
            return total.astype(out.dtype)

        return way

    ways: dict[str, Way] = {"merged": joined}
    trained: Way = joined
    if letters:
        alone = beside(letters, False)
        ways = {"merged": joined if joins else alone, "factored": beside(letters, True)}
        # on a mesh, what trains is summed where it is small; on one device, see `through_matrices`
        apart = plan.trained == "merged" and (layout is not None or not low_precision)
        trained = alone if apart else ways[plan.trained]
    product = each_pass_its_way(ways[plan.forward], ways[plan.inputs], trained)
    return product((kernel, x, seen, carried), [part.term for part in parts])


def through_matrices(
    x: jax.Array,
    term: Term,
    factored: bool,
    *,
    view: View,
    shape: tuple[int, ...],
    letters: Letters,
    layout: Layout | None,
    flat: bool,
) -> jax.Array:
    """A layer's input through the delta of every matrix of its kernel, as its output lies; float32.

    Args:
      factored: without forming delta.
      view, shape: of the kernel.
      letters: the axes of this call.
      flat: merge the axes of rows. XLA's CPU compiler sums over one of them as it lies, but first
        transposes a copy to sum over several, as the gradient of delta does. On a mesh such axes
        may be cut, and cannot be merged in place.
    """
    _, n_in, n_out = view.sizes(shape)

    def one(rows: jax.Array, lam: jax.Array, gamma: jax.Array) -> jax.Array:
        matrix = term._replace(lam=lam, gamma=gamma)
        if layout and layout.used:
            return layout.applied(rows, matrix, n_in, n_out, factored)
        laid = rows.reshape(-1, n_in) if flat else rows
        y = (through_factors if factored else through_delta)(laid, matrix, n_in, n_out)
        return y.reshape(*rows.shape[:-1], n_out)

    every = for_each_matrix(one, letters)
    sizes = [n for side, n in zip(view.axes, shape, strict=True) if side == "o"]
    return as_output(every(as_rows(x, letters), term.lam, term.gamma), letters, sizes)


def kernel_delta(
    terms: Terms, view: View, shape: tuple[int, ...], layout: Layout | None = None
) -> jax.Array:
    """The summed deltas of `terms` in the kernel's layout, float32; stacks one layer at a time."""
    stack, n_in, n_out = view.sizes(shape)
    total = jnp.zeros((), jnp.float32)
    for lam, gamma, bases, scaling in terms:

        def one(
            lam: jax.Array, gamma: jax.Array, bases: Bases = bases, scaling: float = scaling
        ) -> jax.Array:
            term = Term(lam, gamma, bases, scaling)
            return delta(layout.cut(term, n_in, n_out) if layout else term, n_in, n_out)

        for _ in stack:
            one = jax.vmap(one)
        total = total + one(lam, gamma)
    return view.to_kernel(total, shape)
