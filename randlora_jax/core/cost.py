"""Which association of a layer's products is cheapest, in each pass: a static model.

All shapes are static under ``jit``, so the choice is made once, while tracing. With T tokens on a
device, a layer (in, out) and the flattened rank s = r * n, counted in multiply-adds times two
*beyond what the frozen layer itself costs*:

                                 W + delta    x delta beside            factored
    forward                      2 s in out   2 s in out + 2 T in out   2 T s (in + out)
    gradient of the input        2 s in out   2 s in out + 2 T in out   2 T s (in + out)
    gradient of lambda, gamma    2 s in out + 2 T in out (both)         2 T s (in + out)

Where in <= out the two factored gradients share dy @ B_flat. Memory traffic counts as well: what
is formed and read again, in bytes, each as dear as `FLOPS_PER_BYTE` operations.

Where each row of a batch has an adapter of its own, delta runs beside, and what is formed a row is
the question (`row_order`), with t tokens in each of R rows:

    nothing        2 R t s (in + out)               makes r or n numbers of each of x's, the fewer
    A_flat         2 R s min + 2 R t s (in + out)   makes s min numbers a row
    delta          2 R s in out + 2 R t in out      makes in out numbers a row
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import jax.numpy as jnp
from jax.typing import DTypeLike

from randlora_jax.core.rows import RowOrder
from randlora_jax.core.update import formed_in
from randlora_jax.core.ways import PossibleWays, Way

# What a byte moved costs in operations. CPU cores come to about 8, accelerators to 50 and more for
# float32; the choice hardly depends on it, since what is formed is also what is computed.
FLOPS_PER_BYTE = 16.0


@dataclass(frozen=True)
class Work:
    """Operations and bytes moved."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def cost(self) -> float:
        """In operations."""
        return self.flops + FLOPS_PER_BYTE * self.bytes


@dataclass(frozen=True)
class Plan:
    """The way of each pass: forward, gradient of the input, gradient of lambda and gamma."""

    forward: Way
    inputs: Way
    trained: Way

    def __str__(self) -> str:
        passes = {"forward": self.forward, "input gradient": self.inputs}
        passes["lambda and gamma"] = self.trained
        return ", ".join(f"{name}: {way.value}" for name, way in passes.items())


@dataclass(frozen=True)
class Sizes:
    """Of one layer on one device.

    Args:
      tokens: rows of its input.
      n_in, n_out: of its matrix.
      flat_rank: r * n, summed over the adapters that run together.
      shards: the devices that share in forming delta, each a part of it.
      width: bytes of a number that is multiplied.
      formed: bytes of a number of delta.
    """

    tokens: int
    n_in: int
    n_out: int
    flat_rank: int
    shards: int = 1
    width: int = 4
    formed: int = 4

    @classmethod
    def in_dtype(
        cls,
        dtype: DTypeLike,
        tokens: int,
        n_in: int,
        n_out: int,
        flat_rank: int,
        shards: int = 1,
    ) -> "Sizes":
        """Of a layer that multiplies in `dtype`."""
        held = jnp.dtype(dtype)
        widths = held.itemsize, jnp.dtype(formed_in(held)).itemsize
        return cls(tokens, n_in, n_out, flat_rank, shards, *widths)

    def work(self, plan: Plan) -> tuple[Work, Work]:
        """Forward, and both gradients, beyond the frozen layer's own."""
        return self.applied(plan.forward), self.applied(plan.inputs) + self._trained(plan)

    @property
    def frozen_flops(self) -> float:
        """Of the frozen layer, forward and backward."""
        return 4.0 * self.tokens * self.n_in * self.n_out

    @property
    def _delta(self) -> Work:
        """Forming delta from the factors: bfloat16 B, A_flat as wide as delta."""
        low, high = sorted((self.n_in, self.n_out))
        area, rank, width = low * high / self.shards, self.flat_rank, self.formed
        return Work(2 * rank * area, 2 * high * rank + width * (low * rank + 2 * area))

    @property
    def _through_delta(self) -> Work:
        t = self.tokens
        moved = self.width * t * (self.n_in + 2 * self.n_out)
        return Work(2 * t * self.n_in * self.n_out, moved)

    def _half(self, n: int) -> Work:
        """One of the two products of the factored way: (T, n) by (n, s), or back."""
        moved = self.width * self.tokens * (self.flat_rank + n)
        return Work(2 * self.tokens * self.flat_rank * n, moved)

    def applied(self, way: Way) -> Work:
        """Forward, or the gradient of the input, beyond the frozen layer's own."""
        if way is Way.FACTORED:
            return self._half(self.n_in) + self._half(self.n_out)
        return self._delta if way is Way.IN_KERNEL else self._delta + self._through_delta

    def _trained(self, plan: Plan) -> Work:
        if plan.trained is not Way.FACTORED:
            return self._through_delta + self._delta
        shared = plan.inputs is Way.FACTORED and self.n_in <= self.n_out
        return self._half(self.n_in) + (Work() if shared else self._half(self.n_out))


def cheapest(possible: PossibleWays, sizes: Sizes) -> Plan:
    """The plan with the least work among the possible ones; there must be one."""
    return _cheapest((possible.forward, possible.inputs, possible.trained), sizes)


@cache
def _cheapest(possible: tuple[tuple[Way, ...], ...], sizes: Sizes) -> Plan:
    """Asked once for all layers that are alike."""
    plans = [Plan(*ways) for ways in product(*possible)]
    return min(plans, key=lambda plan: sum(work.cost for work in sizes.work(plan)))


@cache
def row_order(sizes: Sizes, rows: int, r: int) -> RowOrder:
    """The order with the least work where `rows` rows have adapters of their own, of rank `r`."""
    return min(RowOrder, key=lambda order: row_work(sizes, rows, r, order).cost)


def row_work(sizes: Sizes, rows: int, r: int, order: RowOrder) -> Work:
    """Of the adapters of `rows` rows, forward, beyond the frozen layer's own."""
    low, high = sorted((sizes.n_in, sizes.n_out))
    t, s = sizes.tokens, sizes.flat_rank  # tokens of all rows
    held = Work(0, 4 * rows * s * low / r + 2 * high * s)  # gamma, and B
    through = Work(2 * t * s * (low + high), sizes.width * t * (low + high + 2 * s))
    if order is RowOrder.TOKENS:
        made = t * min(r, s / r) * low
        return held + through + Work(made, 2 * sizes.formed * made)
    factors = Work(2 * rows * s * low, 2 * sizes.formed * rows * s * low)
    if order is RowOrder.FACTORS:
        return held + through + factors
    area = low * high
    deltas = Work(2 * rows * s * area, 2 * sizes.formed * rows * area)
    moved = sizes.width * t * (low + high)
    return held + factors + deltas + Work(2 * t * area, moved)


def explained(name: str, possible: PossibleWays, sizes: Sizes) -> str:
    """What `cheapest` chose for a layer, what plain alternatives would cost, what is impossible.

    One line, with the reason against each way that the layer cannot take, and what is lost.
    """

    def ratio(plan: Plan) -> str:
        extra = sum(work.flops for work in sizes.work(plan))
        return f"{(sizes.frozen_flops + extra) / sizes.frozen_flops:.2f}"

    plan = cheapest(possible, sizes)
    others = [
        f"all {way.value} {ratio(Plan(way, way, way))}"
        for way in possible.forward
        if possible.forward != (way,)
    ]
    line = f"{name} ({sizes.n_in} -> {sizes.n_out}): {plan}. FLOPs of the frozen layer's step "
    line += ", ".join([f"times {ratio(plan)}", *others])
    told = [line, *(f"not {way.value}: {why}" for way, why in possible.against.items())]
    return "; ".join([*told, possible.caution] if possible.caution else told)


def explained_rows(name: str, possible: PossibleWays, sizes: Sizes, rows: int, r: int) -> str:
    """What rows with adapters of their own form in a layer, and the cost of a forward pass.

    One line; beside it, one adapter for all rows.
    """

    def ratio(work: Work) -> str:
        frozen = sizes.frozen_flops / 2
        return f"{(frozen + work.flops) / frozen:.2f}"

    batch = f"{rows} rows of {sizes.tokens // rows}"
    if Way.FACTORED not in possible.forward:
        against = possible.against[Way.FACTORED]
        return f"{name} ({sizes.n_in} -> {sizes.n_out}): not {batch}: {against}"
    one = min((sizes.applied(way) for way in possible.forward), key=lambda work: work.cost)
    order = row_order(sizes, rows, r)
    what, work = order.value, row_work(sizes, rows, r, order)
    line = f"{name} ({sizes.n_in} -> {sizes.n_out}): {batch} form {what}"
    line += f". FLOPs of the frozen layer's forward times {ratio(work)}"
    return f"{line}, with one adapter for all rows {ratio(one)}"
