"""Which association of a layer's products is cheapest, in each pass: a static model.

All shapes are static under ``jit``, so the choice is made once, while tracing. With T tokens on a
device, a layer (in, out) and the flattened rank s = r * n, counted in multiply-adds times two
*beyond what the frozen layer itself costs*:

                                 merged                        factored
    forward                      2 s in out (+ 2 T in out)     2 T s (in + out)
    gradient of the input        2 s in out (+ 2 T in out)     2 T s (in + out)
    gradient of lambda, gamma    2 s in out + 2 T in out       2 T s (in + out)

"Merged" forms delta and, where the layer may hold W + delta, runs the layer with it; elsewhere
(low precision, dropout) x @ delta is added beside, which is what stands in brackets. Where
in <= out the two factored gradients share dy @ B_flat. Memory traffic counts as well: what is
formed and read again, in bytes, each as dear as `FLOPS_PER_BYTE` operations.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

Way = Literal["merged", "factored"]
Apply = Literal["auto", "factored", "merged"]

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
    """The way of each pass.

    joined: "merged" runs the layer with W + delta; else it adds x @ delta beside.
    """

    forward: Way
    inputs: Way
    trained: Way
    joined: bool

    def __str__(self) -> str:
        merged = "W + delta_W" if self.joined else "x delta_W beside"
        word = {"merged": merged, "factored": "factored"}
        return ", ".join(
            f"{name}: {word[way]}"
            for name, way in (
                ("forward", self.forward),
                ("input gradient", self.inputs),
                ("lambda and gamma", self.trained),
            )
        )


@dataclass(frozen=True)
class Sizes:
    """Of one layer on one device: tokens, (in, out), flattened rank r * n of all its adapters.

    shards: the devices that share in forming delta, each a part of it.
    """

    tokens: int
    n_in: int
    n_out: int
    flat: int
    shards: int = 1

    def work(self, plan: Plan) -> tuple[Work, Work]:
        """Forward, and both gradients, beyond the frozen layer's own."""
        backward = self._backward(plan.inputs, plan.trained, plan.joined)
        return self._forward(plan.forward, plan.joined), backward

    @property
    def _delta(self) -> Work:
        """Forming delta from the factors: bfloat16 B, float32 A_flat and delta."""
        low, high = sorted((self.n_in, self.n_out))
        area = low * high / self.shards
        return Work(2 * self.flat * area, 2 * high * self.flat + 4 * low * self.flat + 8 * area)

    @property
    def _through_delta(self) -> Work:
        t = self.tokens
        return Work(2 * t * self.n_in * self.n_out, 4 * t * (self.n_in + 2 * self.n_out))

    def _half(self, n: int) -> Work:
        """One of the two products of the factored way: (T, n) by (n, s), or back."""
        return Work(2 * self.tokens * self.flat * n, 4 * self.tokens * (self.flat + n))

    def _forward(self, way: Way, joined: bool) -> Work:
        if way == "factored":
            return self._half(self.n_in) + self._half(self.n_out)
        return self._delta if joined else self._delta + self._through_delta

    def _backward(self, inputs: Way, trained: Way, joined: bool) -> Work:
        work = self._forward(inputs, joined)
        if trained == "merged":
            return work + self._through_delta + self._delta
        shares = inputs == "factored" and self.n_in <= self.n_out
        return work + self._half(self.n_in) + (Work() if shares else self._half(self.n_out))


def cheapest(
    tokens: int,
    n_in: int,
    n_out: int,
    flat: int,
    *,
    joins: bool = True,
    factors: bool = True,
    apply: Apply = "auto",
    shards: int = 1,
) -> Plan:
    """The plan with the least work.

    Args:
      tokens: rows of the layer's input on one device.
      flat: r * n, summed over the adapters that run together.
      joins: the layer may run with W + delta, so that delta alone need not be applied.
      factors: the layer is a plain contraction of its input, which the factored way needs.
      apply: "factored" and "merged" insist.
      shards: the devices over which the kernel is cut.
    """
    if apply != "auto" or not factors:
        way: Way = "factored" if apply == "factored" and factors else "merged"
        return Plan(way, way, way, joins)
    sizes, ways = Sizes(tokens, n_in, n_out, flat, shards), get_args(Way)
    plans = [Plan(f, i, t, joins) for f, i, t in product(ways, repeat=3)]
    return min(plans, key=lambda plan: sum(work.cost for work in sizes.work(plan)))


def explained(
    name: str, tokens: int, n_in: int, n_out: int, flat: int, joins: bool, apply: Apply
) -> str:
    """A line on what `cheapest` chose, and what the plain alternatives would cost."""
    plan = cheapest(tokens, n_in, n_out, flat, joins=joins, apply=apply)
    sizes = Sizes(tokens, n_in, n_out, flat)
    frozen = 4.0 * tokens * n_in * n_out

    def ratio(plan: Plan) -> str:
        extra = sum(work.flops for work in sizes.work(plan))
        return f"{(frozen + extra) / frozen:.2f}"

    merged, factored = (Plan(way, way, way, joins) for way in ("merged", "factored"))
    return (
        f"{name} ({n_in} -> {n_out}): {plan}. FLOPs of the frozen layer's step times "
        f"{ratio(plan)}; all merged {ratio(merged)}, all factored {ratio(factored)}"
    )
