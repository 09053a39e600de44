"""Where a layer's arrays lie on a mesh of devices, and what follows for its adapters.

The bases are replicated: any device cuts out the part it needs. So delta is formed in place in the
kernel's own layout, by cutting the factors as the kernel is cut. And where tokens are split over
devices, each of them sums up its own tokens' share of the gradient of lambda and gamma before
anything is sent: the sum over devices is then of lambda's and gamma's size. Left to itself, the
partitioner would sum delta's gradient, which is as large as the kernel.

Explicit mesh axes are part of an array's type. Automatic ones a trace cannot see: then the kernel
counts as it lay when its model was wrapped, and the user names the axes that split the tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax.bases import Bases
from randlora_jax.delta import Term, flat_factors, formed, sliced, through
from randlora_jax.views import View

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Of one layer's call.

    Args:
      mesh: of devices.
      rows: for each leading axis of x, the mesh axes that split it.
      n_in, n_out: the mesh axes that split the kernel's matrix.
    """

    mesh: Any
    rows: tuple[Axes, ...]
    n_in: Axes
    n_out: Axes

    @property
    def tokens(self) -> Axes:
        """Mesh axes that split the tokens."""
        return tuple(axis for axes in self.rows for axis in axes)

    def size(self, axes: Axes) -> int:
        """How many devices lie along `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def cut(self, term: Term, n_in: int, n_out: int) -> Term:
        """`term` with its bases reduced to what (in, out) slices and cut as the kernel is."""
        small, large = (self.n_in, self.n_out) if n_in <= n_out else (self.n_out, self.n_in)
        term = sliced(term, n_in, n_out)
        columns, rows = P(None, small or None), P(large or None)
        return term._replace(
            gamma=self._placed(term.gamma, columns),
            bases=Bases(self._placed(term.bases.A, columns), self._placed(term.bases.B, rows)),
        )

    def applied(self, x: jax.Array, term: Term, n_in: int, n_out: int, factored: bool) -> jax.Array:
        """x (rows..., in) @ delta, (rows..., out) in float32; `factored`: without forming delta.

        Written for each device, so that what is summed over devices backwards is the gradient of
        lambda and gamma. Where the kernel is cut along the axes that split the tokens (FSDP), delta
        is formed in parts and gathered: its gradient is scattered, and each device works on its
        part. Along other axes (tensor parallel) each device keeps to its part of the layer.
        """
        wide, term = n_in <= n_out, sliced(term, n_in, n_out)
        gathered = [tuple(a for a in axes if a in self.tokens) for axes in (self.n_in, self.n_out)]
        kept = [tuple(a for a in axes if a not in self.tokens) for axes in (self.n_in, self.n_out)]
        cuts = kept if factored else [self.n_in, self.n_out]
        small, large = cuts if wide else cuts[::-1]
        manual = {*self.tokens, *self.n_in, *self.n_out}

        def local(x: jax.Array, lam: jax.Array, gamma: jax.Array, bases: Bases) -> jax.Array:
            # from here on they differ, as far as a device knows: so their gradients stay apart
            lam = jax.lax.pcast(lam, tuple(manual), to="varying")
            gamma = jax.lax.pcast(gamma, tuple(manual - set(small)), to="varying")
            factors = flat_factors(Term(lam, gamma, bases, term.scaling))
            if factored:
                return jax.lax.psum(through(x, *factors, wide), kept[0])
            whole = formed(*factors, wide)
            for axis, axes in enumerate(gathered):
                if axes:
                    whole = jax.lax.all_gather(whole, axes, axis=axis, tiled=True)
            return jax.lax.psum(x @ whole, kept[0])

        rows = [axes or None for axes in self.rows]
        columns = P(None, small or None)
        specs = (P(*rows, kept[0] or None), P(), columns, Bases(columns, P(large or None)))
        arrays = (x.astype(jnp.float32), term.lam, term.gamma, term.bases)
        if _explicit(self.mesh):
            arrays = jax.tree.map(self._placed, arrays, specs)
        mapped = jax.shard_map(
            local,
            mesh=None if _explicit(self.mesh) else self.mesh,
            in_specs=specs,
            out_specs=P(*rows, kept[1] or None),
            axis_names=manual,
        )
        return mapped(*arrays)

    def _placed(self, x: jax.Array, spec: P) -> jax.Array:
        if _explicit(self.mesh):
            return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def layout_of(
    x: jax.Array,
    kernel: jax.Array,
    view: View,
    contracts: int,
    base: NamedSharding | None,
    token_axes: Axes,
) -> Layout | None:
    """The layout of a call, None where there is no mesh or nothing is known of it.

    Args:
      contracts: so many last axes of x are summed over.
      base: the kernel's sharding when its model was wrapped.
      token_axes: mesh axes that split x's first axis, for automatic meshes.
    """
    types = jax.typeof(x).sharding, jax.typeof(kernel).sharding
    if _explicit(types[0].mesh):
        mesh, rows = types[0].mesh, _entries(types[0].spec, x.ndim)[: x.ndim - contracts]
        spec = _entries(types[1].spec, kernel.ndim)
    elif base is not None:
        mesh, leading = base.mesh, x.ndim - contracts
        size = math.prod(mesh.shape[axis] for axis in token_axes)
        split = token_axes if leading and x.shape[0] % size == 0 else ()
        rows = [split, *[()] * (leading - 1)] if leading else []
        # scans take the leading axes off
        whole = _entries(base.spec, max(len(base.spec), kernel.ndim))
        spec = whole[len(whole) - kernel.ndim :]
    else:
        return None
    sides: dict[str, list[Axes]] = {"i": [], "o": [], "s": []}
    for letter, axes in zip(view.axes, spec, strict=True):
        sides[letter].append(axes)
    # a matrix axis made of several is cut evenly only along the first of them
    plain = not any(any(rest) for _, *rest in (sides["i"], sides["o"]))
    if not plain or any(sides["s"]):
        return None
    return Layout(mesh, tuple(rows), sides["i"][0], sides["o"][0])


def _explicit(mesh: Any) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _entries(spec: P, ndim: int) -> list[Axes]:
    """For each array axis the mesh axes that split it."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
