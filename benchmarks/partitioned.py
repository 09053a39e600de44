"""What one device does in a partitioned program: products by type, and what it sends; read as text.

XLA writes a compiled program as computations of instructions, one a line. An instruction of a
computation that others call runs as often as they do, in a loop once for each turn.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # else the number in the name
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS = ("dot", "convolution")  # a TPU's matrix products are convolutions
CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)"
)
LINE = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (.*?[\]})]) ([a-z][\w-]*)\((.*)$")
HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")


class Shape(NamedTuple):
    """Of one array: element type and extents."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Without padding."""
        bits = BITS.get(self.dtype) or int(re.sub(r"\D+", "", self.dtype.split("e")[0]))
        return math.ceil(math.prod(self.sizes) * bits / 8)


def shapes_in(text: str) -> list[Shape]:
    """Of all arrays of a (tuple) type."""
    found = re.findall(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]", text)
    return [Shape(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


@dataclass(frozen=True)
class Instruction:
    """One line: its name, what it makes, its operation, and the rest of the line."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names; types in front of them, as some releases write, are left out."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")", 1)[0])

    def attribute(self, name: str) -> str:
        """What stands after `name=`, up to the next one; empty if nothing does."""
        found = re.search(rf"\b{name}=(.*?)(?:, [a-z_]+=|$)", self.rest)
        return found[1] if found else ""


class Sent(NamedTuple):
    """By one kind of collective, in a step."""

    count: int
    nbytes: float


class Program:
    """A compiled program, as `compiled.as_text()` or XLA's dump has it."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        body: list[Instruction] = []
        for line in text.splitlines():
            if head := HEAD.match(line):
                body = self.computations[head[2]] = []
                if head[1]:
                    self.entry = head[2]
            elif found := LINE.match(line):
                body.append(Instruction(*found.groups()))

    @cached_property
    def runs(self) -> Mapping[str, int]:
        """How often each computation is run in a step."""
        found: Counter[str] = Counter()

        def visit(name: str, times: int) -> None:
            found[name] += times
            for each in self.computations[name]:
                # the later halves of something asynchronous name its computation again
                if each.operation in ("async-update", "async-done"):
                    continue
                turns = trip_count(each) if each.operation == "while" else 1
                for called in CALLS.findall(each.rest):
                    visit(called, times * turns)

        visit(self.entry, 1)
        return found

    def instructions(self, operations: Sequence[str]) -> Iterator[tuple[int, str, Instruction]]:
        """(how often it runs, its computation, itself) of all of some operations."""
        for name, times in self.runs.items():
            for each in self.computations[name]:
                if each.operation in operations:
                    yield times, name, each

    def shape(self, computation: str, name: str) -> Shape:
        """Of an operand within a computation."""
        (found,) = (each for each in self.computations[computation] if each.name == name)
        return shapes_in(found.type)[0]

    @cached_property
    def products(self) -> Mapping[str, float]:
        """Operations of the matrix products, by their operands' type; both where they differ."""
        found: Counter[str] = Counter()
        for times, computation, each in self.instructions(PRODUCTS):
            left, right = (self.shape(computation, name) for name in each.operands[:2])
            (out,) = shapes_in(each.type)
            count = depth(each, left) * math.prod(out.sizes)
            if each.operation == "convolution":
                count = multiplied(each, left, right, out)
            kind = "/".join(dict.fromkeys((left.dtype, right.dtype)))
            found[kind] += times * 2 * count
        return found

    @cached_property
    def sent(self) -> Mapping[str, Sent]:
        """What a device sends, by kind of collective.

        Bytes as rings send them: of n devices each sends (n - 1) / n of what is gathered,
        scattered or exchanged, and twice that of what is summed and kept whole.
        """
        found: dict[str, Sent] = {}
        starts = (*KINDS, *(f"{kind}-start" for kind in KINDS))
        for times, computation, each in self.instructions(starts):
            kind = each.operation.removesuffix("-start")
            whole = sum(self.shape(computation, name).nbytes for name in each.operands)
            among = 1 if kind == "collective-permute" else group_size(each)
            if kind == "all-gather":
                whole *= among
            if kind == "all-reduce" and "all-reduce-scatter" in computation:
                kind = "reduce-scatter"  # as a TPU writes it: a sum of which each keeps a part
            share = 1.0 if kind == "collective-permute" else (among - 1) / among
            share *= 2 if kind == "all-reduce" else 1
            before = found.get(kind, Sent(0, 0.0))
            found[kind] = Sent(before.count + times, before.nbytes + times * share * whole)
        return found


def trip_count(loop: Instruction) -> int:
    """Of a `while`."""
    found = re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.rest)
    if not found:
        raise ValueError(f"XLA does not say how often the loop %{loop.name} runs")
    return int(found[1])


def group_size(collective: Instruction) -> int:
    """How many devices take part together."""
    text = collective.rest.partition("replica_groups=")[2]
    if first := re.match(r"\{\{([\d,]*)\}", text):
        return len(first[1].split(","))
    if listed := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(listed[1])
    if mesh := re.match(r"mesh\[(.*?)\](?:, device_ids=\(\S+\))? \{(.*?)\}", text):
        extents = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # whole ones, and parts of some
        return math.prod(int(part or extents[axis]) for axis, part in axes)
    raise ValueError(f"no group of devices that we can read in %{collective.name}: {text[:80]!r}")


def depth(dot: Instruction, left: Shape) -> int:
    """How many products each number of a dot's result sums."""
    axes = dot.attribute("lhs_contracting_dims").strip("{}")
    return math.prod(left.sizes[int(axis)] for axis in axes.split(",") if axis)


def multiplied(convolution: Instruction, left: Shape, right: Shape, out: Shape) -> int:
    """How many products a convolution sums in all; those with padding or between are none."""
    of_left, of_right, of_out = re.split("_|->", convolution.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=([^ }]+)", convolution.attribute("window")))
    axes = sorted(label for label in of_left if label.isdigit())

    def setting(name: str, axis: int, otherwise: str) -> str:
        return window[name].split("x")[axis] if name in window else otherwise

    count = left.sizes[of_left.index("b")] * right.sizes[of_right.index("i")]
    count *= right.sizes[of_right.index("o")]
    for i, label in enumerate(axes):
        there = left.sizes[of_left.index(label)]
        stride, wide = int(setting("stride", i, "1")), int(setting("lhs_dilate", i, "1"))
        apart, before = int(setting("rhs_dilate", i, "1")), setting("pad", i, "0_0").split("_")[0]
        count *= sum(
            0 <= at < there * wide and at % wide == 0
            for o in range(out.sizes[of_out.index(label)])
            for k in range(right.sizes[of_right.index(label)])
            for at in (o * stride + k * apart - int(before),)
        )
    groups = int(convolution.attribute("batch_group_count") or 1)
    return count // groups


class Held(NamedTuple):
    """Bytes on a device: what a step is given, and what lives at once while it runs, at most.

    Args:
      allocated: what XLA sets aside for the latter; gaps between what lives are in it.
    """

    given: int
    live: int
    allocated: int


def held(assignment: str, lives: str) -> Held:
    """Out of XLA's dumps of a buffer assignment and of live ranges; device memory alone."""
    given = re.findall(r"^allocation \d+: size (\d+), page 0, parameter", assignment, re.MULTILINE)
    temporary = "".join(
        part
        for part in re.split(r"^(?=allocation )", assignment, flags=re.MULTILINE)
        if re.match(r"allocation \d+: size \d+, page 0, preallocated-temp", part)
    )
    allocated = re.findall(r"^allocation \d+: size (\d+)", temporary, re.MULTILINE)
    if not given or not allocated:
        raise ValueError("no parameters or no temporary buffers in what XLA wrote: another format?")
    when = {
        name.removesuffix("{}"): (int(first), int(last))
        for name, first, last in re.findall(r"^ *(\S+):(\d+)-(\d+)$", lives, re.MULTILINE)
    }
    values = re.findall(r"value: <\d+ (\S+) @0> \(size=(\d+),offset=(\d+)\)", temporary)
    places = [
        (*when[name], int(offset), int(offset) + int(size))
        for name, size, offset in values
        if name in when
    ]
    live = max(
        covered([p[2:] for p in places if p[0] <= t <= p[1]]) for t in {p[0] for p in places}
    )
    return Held(sum(map(int, given)), live, sum(map(int, allocated)))


def covered(intervals: Sequence[tuple[int, ...]]) -> int:
    """How much several intervals cover together; values that share a place count once."""
    total = end = 0
    for first, last in sorted(intervals):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total
