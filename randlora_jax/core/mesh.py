"""Where a layer's arrays lie on a mesh of devices, and what follows for its adapters.

The bases are replicated: any device cuts out the part it needs. So delta is formed in place in the
kernel's own layout, by cutting the factors as the kernel is cut. And where tokens are split over
devices, each of them sums up its own tokens' share of the gradient of lambda and gamma before
anything is sent: the sum over devices is then of lambda's and gamma's size. Left to itself, the
partitioner would sum delta's gradient, which is as large as the kernel.

Explicit mesh axes are part of an array's type. How automatic ones cut an array a trace cannot see:
then the kernel counts as it lay when its model was wrapped, and the user names the axes that split
the tokens. The mesh itself it sees, without its devices: so a model may be moved to others.
Where the layout cannot be followed (an inner axis of several that form one side of the matrix is
cut, or the kernel has come to lie on a mesh of other axes), the partitioner decides, but for the
bases: what a layer takes of them is whole on every device. A cut that runs through the shared pair
would be another one in each layer's corner of it, and rows of bases would be sent to and fro.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.kernel_layout import KernelLayout
from randlora_jax.core.rows import RowOrder, RowUpdates
from randlora_jax.core.update import Update, formed_in, through

Axes = tuple[str, ...]
U = TypeVar("U", Update, RowUpdates)


@dataclass(frozen=True)
class Placement:
    """Where one layer lies.

    Args:
      mesh: of devices.
      n_in, n_out: the mesh axes that split the kernel's matrix.
      followed: it is cut along no others, so that what is made for it can be cut alike.
      rows: in a call, for each leading axis of x, the mesh axes that split it.
    """

    mesh: Any
    n_in: Axes
    n_out: Axes
    followed: bool = True
    rows: tuple[Axes, ...] = ()

    def of_rows(self, x: jax.Array, shared: int, token_axes: Axes) -> "Placement":
        """With the rows of `x`, (`shared` stack axes, rows..., in).

        Args:
          token_axes: mesh axes that split the first of the rows, where their type does not say.
        """
        sizes = x.shape[shared:-1]
        if not self.followed:
            return self
        if _explicit(self.mesh):
            return replace(
                self, rows=tuple(_entries(jax.typeof(x).sharding.spec, x.ndim)[shared:-1])
            )
        rows: list[Axes] = [()] * len(sizes)
        if sizes and sizes[0] % self.size(token_axes) == 0:
            rows[0] = token_axes
        return replace(self, rows=tuple(rows))

    @property
    def tokens(self) -> Axes:
        """Mesh axes that split the tokens."""
        return tuple(axis for axes in self.rows for axis in axes)

    @property
    def used(self) -> Axes:
        """Mesh axes that split something."""
        return tuple(dict.fromkeys((*self.tokens, *self.n_in, *self.n_out)))

    def size(self, axes: Axes) -> int:
        """How many devices lie along `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def sliced(self, update: U) -> U:
        """`update` of one matrix with just its corners of the bases, whole on every device."""
        update = update.sliced()
        return replace(update, pair=BasisPair(*(self._placed(x, P()) for x in update.pair)))

    def cut(self, update: Update) -> Update:
        """`update` of one matrix, its bases sliced and cut as the kernel is."""
        update = self.sliced(update)
        if not self.followed:
            return update
        n_in, n_out = self.n_in, self.n_out
        small, large = (n_in, n_out) if update.in_is_smaller else (n_out, n_in)
        columns, rows = P(None, small or None), P(large or None)
        return replace(
            update,
            gamma=self._placed(update.gamma, columns),
            pair=BasisPair(self._placed(update.pair.A, columns), self._placed(update.pair.B, rows)),
        )

    def applied(self, x: jax.Array, update: Update, *, factored: bool) -> jax.Array:
        """x (rows..., in) @ delta, (rows..., out), in x's dtype.

        `factored`: without forming delta.

        Written for each device, so that what is summed over devices backwards is the gradient of
        lambda and gamma. Where the kernel is cut along the axes that split the tokens (FSDP), delta
        is formed in parts and gathered: its gradient is scattered, and each device works on its
        part. Along other axes (tensor parallel) each device keeps to its part of the layer.
        """
        update = self.sliced(update)
        gathered = [tuple(a for a in axes if a in self.tokens) for axes in (self.n_in, self.n_out)]
        kept = self._kept
        cuts = kept if factored else [self.n_in, self.n_out]
        small, large = cuts if update.in_is_smaller else cuts[::-1]

        def local(x: jax.Array, lam: jax.Array, gamma: jax.Array, *pair: jax.Array) -> jax.Array:
            # from here on they differ, as far as a device knows: so their gradients stay apart
            lam = jax.lax.pcast(lam, self.used, to="varying")
            gamma = jax.lax.pcast(
                gamma, tuple(a for a in self.used if a not in small), to="varying"
            )
            mine = replace(update, lam=lam, gamma=gamma, pair=BasisPair(*pair))
            factors = mine.factors(formed_in(x.dtype))
            if factored:
                return jax.lax.psum(factors.applied(x), kept[0])
            whole = factors.formed()
            for axis, axes in enumerate(gathered):
                if axes:
                    whole = jax.lax.all_gather(whole, axes, axis=axis, tiled=True)
            return jax.lax.psum(through(x, whole, wide=update.wide), kept[0])

        columns = P(None, small or None)
        specs = P(), columns, columns, P(large or None)
        return self._on_each_device(local, x, (update.lam, update.gamma, *update.pair), specs)

    def applied_by_row(self, x: jax.Array, updates: RowUpdates, order: RowOrder) -> jax.Array:
        """x (rows, ..., in) through each row's delta, (rows, ..., out), as `RowUpdates.applied`.

        Lambda and gamma are split as the rows are. What a row needs lies with it, so nothing of a
        delta is gathered: of the layer each device has the part that other axes cut.
        """
        updates, kept = self.sliced(updates), self._kept
        small, large = kept if updates.in_is_smaller else kept[::-1]

        def local(x: jax.Array, lam: jax.Array, gamma: jax.Array, *pair: jax.Array) -> jax.Array:
            mine = replace(updates, lam=lam, gamma=gamma, pair=BasisPair(*pair))
            return jax.lax.psum(mine.applied(x, order), kept[0])

        batch = self.rows[0] or None
        columns = small or None
        specs = P(batch), P(batch, None, None, columns), P(None, columns), P(large or None)
        return self._on_each_device(local, x, (updates.lam, updates.gamma, *updates.pair), specs)

    @property
    def _kept(self) -> list[Axes]:
        """Mesh axes that split in and out, and not the tokens."""
        return [tuple(a for a in axes if a not in self.tokens) for axes in (self.n_in, self.n_out)]

    def _on_each_device(
        self,
        local: Callable[..., jax.Array],
        x: jax.Array,
        arrays: tuple[jax.Array, ...],
        specs: tuple[P, ...],
    ) -> jax.Array:
        """local(x, *arrays) of each device's part of them: x (rows..., in) to (rows..., out)."""
        rows = [axes or None for axes in self.rows]
        kept_in, kept_out = self._kept
        every, specs = (x, *arrays), (P(*rows, kept_in or None), *specs)
        if _explicit(self.mesh):
            every = tuple(map(self._placed, every, specs))
        # an explicit mesh that the user has set is the context's, and shard_map takes that
        in_context = _explicit(self.mesh) and not jax.sharding.get_abstract_mesh().empty
        mapped = jax.shard_map(
            local,
            mesh=None if in_context else self.mesh,
            in_specs=specs,
            out_specs=P(*rows, kept_out or None),
            axis_names=set(self.used),
        )
        return mapped(*every)

    def _placed(self, x: jax.Array, spec: P) -> jax.Array:
        return placed(x, NamedSharding(self.mesh, spec))


def placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, to lie as `sharding` says, in a trace or outside."""
    mesh = sharding.mesh
    if not _explicit(mesh):
        return jax.lax.with_sharding_constraint(x, sharding)
    if AxisType.Auto not in mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    # a mesh with axes of both kinds: for each kind JAX has another function
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    entries = _entries(sharding.spec, x.ndim)
    explicit, automatic = (
        NamedSharding(mesh, P(*(tuple(a for a in axes if kinds[a] == kind) for axes in entries)))
        for kind in (AxisType.Explicit, AxisType.Auto)
    )
    return jax.lax.with_sharding_constraint(jax.sharding.reshard(x, explicit), automatic)


def splits_rows(x: jax.Array) -> bool:
    """Whether explicit mesh axes split the first axis of `x`."""
    sharding = jax.typeof(x).sharding
    return _explicit(sharding.mesh) and bool(_entries(sharding.spec, x.ndim)[0])


def along(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, its first axis split as that of `like` is, where the types of explicit meshes say so."""
    sharding = jax.typeof(like).sharding
    if not _explicit(sharding.mesh):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(sharding.spec[0])))


def picked(x: jax.Array, index: jax.Array, axis: int, **how: Any) -> jax.Array:
    """`x` at `index` along an axis, the result split as the index is where that is in its type.

    Args:
      x: whole on every device; or NumPy's, as a checkpoint leaves it.
      how: for what is out of bounds, as ``x.at[index].get`` takes it.
    """
    sharding = jax.typeof(index).sharding
    if _explicit(sharding.mesh):
        spec = P(*[None] * axis, *_entries(sharding.spec, index.ndim))
        how["out_sharding"] = NamedSharding(sharding.mesh, spec)
    return jnp.asarray(x).at[(*[slice(None)] * axis, index)].get(**how)


def on_mesh(x: Any) -> NamedSharding | None:
    """How an array lies on a mesh of devices, None where it does not."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def beside(x: Any) -> NamedSharding | None:
    """Whole on every device of the mesh that an array lies on, in a trace or outside; None of none.

    In a trace the mesh is without its devices, and none where each device runs by itself.
    """
    if not isinstance(x, jax.core.Tracer):
        sharding = on_mesh(x)
        return NamedSharding(sharding.mesh, P()) if sharding else None
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or _manual(mesh) else NamedSharding(mesh, P())


def off_mesh(x: jax.Array) -> bool:
    """Whether a traced array lies on no mesh that its trace can see."""
    return bool(jax.typeof(x).sharding.mesh.empty)


def on_host(x: jax.Array) -> Any:
    """NumPy's copy of an array, which may lie on devices of several processes: all call this."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@contextmanager
def alone_among_processes(what: str) -> Iterator[bool]:
    """True in the first process; the others go on when it is done."""
    try:
        yield jax.process_index() == 0
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"randlora_jax.{what}")


def placement_of(
    kernel: jax.Array, layout: KernelLayout, base: NamedSharding | None, *, packed: bool = False
) -> Placement | None:
    """Where a layer lies, by its kernel, None where there is no mesh.

    Nor is there one where each device runs by itself, with all of the kernel.

    Args:
      base: the kernel's sharding when its model was wrapped, of the axes that scans left, for
        automatic meshes.
      packed: the array is no kernel of the layout, but holds one in another shape.
    """
    sharding = jax.typeof(kernel).sharding
    mesh, spec, other = sharding.mesh, sharding.spec, False
    if _manual(mesh):
        return None
    if not _explicit(mesh):
        if base is None:
            return None
        if isinstance(kernel, jax.core.Tracer):
            # what ``jit`` itself puts on a mesh has none in its type
            mesh, spec = base.mesh if mesh.empty else mesh, base.spec
        elif lying := on_mesh(kernel):
            mesh, spec = lying.mesh, lying.spec
        else:
            return None
        other = mesh.shape_tuple != base.mesh.shape_tuple
    if packed or other:
        return Placement(mesh, (), (), followed=False)
    sides: dict[str, list[Axes]] = {"i": [], "o": [], "s": []}
    for letter, axes in zip(layout.axes, _entries(spec, kernel.ndim), strict=True):
        sides[letter].append(axes)
    # a side made of several axes is cut in contiguous parts only along the first of them
    inner = [axes for side in "io" for axes in sides[side][1:]]
    if any(inner) or any(sides["s"]):
        return Placement(mesh, (), (), followed=False)
    return Placement(mesh, sides["i"][0], sides["o"][0])


def _explicit(mesh: Any) -> bool:
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def _manual(mesh: Any) -> bool:
    return AxisType.Manual in mesh.axis_types


def _entries(spec: P, ndim: int) -> list[Axes]:
    """For each array axis the mesh axes that split it."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]
