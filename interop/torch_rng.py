"""PyTorch's RandLoRA bases, bit for bit, without PyTorch.

PEFT draws an adapter's bases from a seed on the CPU, and a file saved with
``save_projection=False`` holds that seed alone. So whoever opens the file must repeat the draw to
the last bit. Four things decide it: the key, the extents, the algorithm by which the installed
torch turns random words into numbers (a `Generation`), and the base model's dtype, to which PEFT
casts the result.

The rules, each with the place in PyTorch or PEFT that makes it:

1. Words: MT19937 seeded with the key's low 32 bits (``torch.Generator.manual_seed``), one 32-bit
   word an element in memory order (``cpu_serial_kernel`` in ATen's DistributionTemplates.h).
   All of A comes first, then B (PEFT's ``RandLoraModel._init_randlora_A_randlora_B``).
2. Dense: A is one draw, B one draw of (MAX, 1, r) for each basis. A draw is uniform within
   ``bound`` (``torch.nn.init.kaiming_uniform_`` with a = sqrt 5); see `_Rule` for the generations.
3. Sparse: words become multiples of 2^-24 in [0, 1), the lower 1/(2s) of them -1, the upper +1.
4. A and B are each divided by their sample standard deviation: accumulated in double precision,
   rounded to the dtype of the draw, the quotient rounded to that dtype too.
5. The result takes the base layer's dtype (``_move_adapter_to_device_of_base_layer``) and, being
   a floating point adapter weight, float32 from then on (``autocast_adapter_dtype``).

``docs/torch-generations.md`` tells which torch releases were run, and how to check another.
"""

import enum
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
from randlora_jax.interop.errors import ConfigError, warn
from randlora_jax.interop.progress import Advance, no_bar

Kind = Literal["dense", "sparse", "very_sparse"]

_CHUNK = 1 << 16  # elements in flight at a time: a cache's worth, so memory is the result's own
_F32 = np.dtype(np.float32)
_BF16 = np.dtype(ml_dtypes.bfloat16)
_F16 = np.dtype(np.float16)


def word_bytes(r: int, MIN: int, MAX: int) -> int:
    """The bytes of all random words behind a pair of these extents."""
    return 4 * (r * MIN + MAX * math.ceil(MIN / r) * r)


class Generation(enum.StrEnum):
    """The algorithms by which PyTorch releases draw dense bases; sparse ones never changed."""

    BF16_8BIT = "bf16-8bit"
    BF16_24BIT = "bf16-24bit"
    BF16_24BIT_NO_FMA = "bf16-24bit-no-fma"
    F16_11BIT = "f16-11bit"
    F16_24BIT = "f16-24bit"
    F16_24BIT_NO_FMA = "f16-24bit-no-fma"

    @property
    def dtype(self) -> np.dtype:
        """What is drawn in."""
        return _RULES[self].dtype

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ConfigError(
            f"torch generation {value!r}: PyTorch releases draw different dense bases from one "
            f"key, so name one of {', '.join(cls)} (generation_of(torch.__version__) tells it)"
        )


@dataclass(frozen=True)
class _Rule:
    """How a word becomes a number between -bound and bound (ATen's ``uniform_kernel``).

    dtype: of the draw; float16 only where PEFT finds no bfloat16 (older GPUs).
    bits: low bits of a word in use. As many as `dtype` has digits: the bounds are rounded to
      `dtype` first. 24: they are float32, and what rounds up to the upper bound becomes the lower.
    fused: whether ``unit * width + low`` is rounded once, as on processors that fuse the two, or
      twice. Matters for 24 bits only: with fewer the product is exact.
    """

    dtype: np.dtype
    bits: int
    fused: bool = True


_RULES = {
    Generation.BF16_8BIT: _Rule(_BF16, 8),
    Generation.BF16_24BIT: _Rule(_BF16, 24),
    Generation.BF16_24BIT_NO_FMA: _Rule(_BF16, 24, fused=False),
    Generation.F16_11BIT: _Rule(_F16, 11),
    Generation.F16_24BIT: _Rule(_F16, 24),
    Generation.F16_24BIT_NO_FMA: _Rule(_F16, 24, fused=False),
}

# From this (major, minor) release on, newest first: what a machine with bfloat16 and FMA draws.
_RELEASES = (((2, 12), Generation.BF16_24BIT), ((2, 2), Generation.BF16_8BIT))
_NEWEST_RUN = (2, 15)


def generation_of(torch_version: str) -> Generation:
    """What ``torch.__version__`` draws by, on a machine with bfloat16 and fused multiply-add.

    Warns for a release newer than any that was run; raises ConfigError for one older than 2.2 (its
    ``kaiming_uniform_`` takes no generator, so PEFT cannot draw) and for a pre-release of the very
    release that brought a change.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.\d+)*(a|b|rc|\.?dev)?", torch_version)
    if match is None:
        raise ConfigError(f"torch version {torch_version!r}: expected something like '2.13.0+cpu'")
    release = int(match[1]), int(match[2])
    if match[3] and any(release == since for since, _ in _RELEASES):
        raise ConfigError(
            f"torch {torch_version} comes before the release that changed the draw and may draw "
            "either way: name the generation itself, benchmarks/torch_generation.py finds it"
        )
    if release > _NEWEST_RUN:
        warn(
            f"torch {torch_version} is newer than any release whose draw was checked "
            f"({'.'.join(map(str, _NEWEST_RUN))}); assuming {_RELEASES[0][1]}. "
            "benchmarks/torch_generation.py checks it"
        )
    for since, generation in _RELEASES:
        if release >= since:
            return generation
    raise ConfigError(f"torch {torch_version}: PEFT's RandLoRA needs torch 2.2 or later")


def torch_bases(
    key: int,
    r: int,
    MIN: int,
    MAX: int,
    *,
    kind: Kind = "dense",
    generation: Generation | str | None = None,
    base_dtype: npt.DTypeLike = np.float32,
    advance: Advance = no_bar,
) -> tuple[np.ndarray, np.ndarray]:
    """The pair A (r, 1, MIN), B (MAX, ceil(MIN / r), r) that PEFT draws for `key`.

    Args:
      key: ``projection_prng_key``; what ``torch.Generator.manual_seed`` takes.
      r: rank of each basis.
      MIN: the smaller extent of PEFT's pair.
      MAX: the larger one.
      kind: dense; sparse (s = 3); or very sparse (s = sqrt(MIN)).
      generation: which dense draw; required for dense bases, without meaning for the others.
      base_dtype: float32, bfloat16 or float16, that of the base model's adapted layers.
      advance: told how many words (`word_bytes` in all) have been drawn, in bytes.

    Returns:
      Exactly the numbers that PEFT computes with (in float32). Dense ones come in the dtype of the
      draw, bfloat16 or float16, which holds them without loss whatever `base_dtype`: half the
      memory. Sparse ones come in float32.

    Raises:
      ConfigError: arguments out of range; a dense draw without a generation; extents for which the
        standard deviation is zero or undefined, so that PEFT's bases are not finite.
    """
    source = _Source(kind, generation, base_dtype, advance)
    words = _words(key)
    return source.draw_a(words, r, MIN, MAX), source.draw_b(words, r, MIN, MAX)


class TorchDraw(NamedTuple):
    """How PyTorch drew a pair of bases, its key and extents apart.

    generation: None for sparse bases, which every torch release draws alike.
    base_dtype: the first of float32, bfloat16 and float16 that gives these numbers; for dense
      bases drawn in bfloat16 the first two always give the same.
    """

    kind: Kind
    generation: Generation | None
    base_dtype: np.dtype

    @property
    def source(self) -> str:
        """As the metadata of a file names it, less the extents: ``torch:bf16-8bit:float32``."""
        return f"torch:{self.generation or self.kind}:{self.base_dtype}"

    def label(self, MAX: int, MIN: int) -> str:
        """As the metadata of a file names it: ``torch:bf16-8bit:float32:4096x1024``."""
        return f"{self.source}:{MAX}x{MIN}"


def torch_draw(kind: Kind, generation: Generation | None, base_dtype: npt.DTypeLike) -> TorchDraw:
    """The draw for base models in `base_dtype`, one name for what is surely the same.

    The dtype of a dense draw rounds nothing more: such a draw is named float32, as by `identify`.
    """
    if generation is not None and np.dtype(base_dtype) == generation.dtype:
        base_dtype = _F32
    return TorchDraw(kind, generation, np.dtype(base_dtype))


def identify(
    A: np.ndarray, B: np.ndarray | None, key: int, advance: Advance = no_bar
) -> TorchDraw | None:
    """How PyTorch drew A (r, 1, MIN) and B (MAX, N, r) from `key`, or None if it did not.

    With B None, A alone decides (the draws with and without fused multiply-add often share A).
    """
    return next((draw for draw in _draws() if is_drawn(A, B, key, draw, advance)), None)


def is_drawn(
    A: np.ndarray, B: np.ndarray | None, key: int, draw: TorchDraw, advance: Advance = no_bar
) -> bool:
    """Whether PyTorch draws A (r, 1, MIN) and B (MAX, N, r) from `key` in the way `draw` says.

    Every element is compared, by value, so the arrays may be in float32 or any narrower dtype. A
    comes first in the stream: where it differs, B is not drawn. With B None, A alone decides.
    """
    if A.ndim != 3 or A.shape[1] != 1 or not A.size or _out_of_range(key):
        return False
    r, _, MIN = A.shape
    MAX = MIN if B is None else B.shape[0]
    if B is not None and (MAX < MIN or B.shape != (MAX, math.ceil(MIN / r), r)):
        return False
    source, words = _Source(*draw, advance), _words(key)
    try:
        return _equal(A, source.draw_a(words, r, MIN, MAX)) and (
            B is None or _equal(B, source.draw_b(words, r, MIN, MAX))
        )
    except ConfigError:  # this draw has no finite result for these extents
        return False


def _draws() -> Iterator[TorchDraw]:
    """Every way to draw, the likely ones first."""
    for base_dtype in (_F32, _BF16, _F16):
        for generation, rule in _RULES.items():
            if base_dtype is _F32 or base_dtype != rule.dtype:  # else no second rounding
                yield TorchDraw("dense", generation, base_dtype)
        yield TorchDraw("sparse", None, base_dtype)
        yield TorchDraw("very_sparse", None, base_dtype)


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether all values agree, compared in float32 a few rows at a time."""
    rows = max(1, _CHUNK * len(x) // x.size)
    return x.shape == y.shape and all(
        np.array_equal(x[i : i + rows].astype(_F32), y[i : i + rows].astype(_F32))
        for i in range(0, len(x), rows)
    )


def _out_of_range(key: int) -> bool:
    return not -(2**63) <= key < 2**64


def _words(key: int) -> np.random.RandomState:
    """Torch's stream of random words; NumPy keeps RandomState's streams for ever (NEP 19)."""
    if _out_of_range(key):
        raise ConfigError(f"projection_prng_key {key}: torch takes -2^63 to 2^64 - 1")
    return np.random.RandomState(key & 0xFFFFFFFF)


class _Source:
    """One way to draw: A, then B from the same words."""

    def __init__(
        self,
        kind: Kind,
        generation: Generation | str | None,
        base_dtype: npt.DTypeLike,
        advance: Advance,
    ):
        self.advance = advance
        if kind not in ("dense", "sparse", "very_sparse"):
            raise ConfigError(f"kind {kind!r}: expected 'dense', 'sparse' or 'very_sparse'")
        self.base_dtype = np.dtype(base_dtype)
        if self.base_dtype not in (_F32, _BF16, _F16):
            raise ConfigError(f"base dtype {self.base_dtype}: expected float32, bfloat16, float16")
        self.kind = kind
        if kind == "dense":
            self.rule = _RULES[Generation(cast(str, generation))]  # None is refused as well

    def draw_a(self, words: np.random.RandomState, r: int, MIN: int, MAX: int) -> np.ndarray:
        """A (r, 1, MIN)."""
        if not (r >= 1 and 1 <= MIN <= MAX):
            raise ConfigError(f"r {r}, MIN {MIN}, MAX {MAX}: expected 1 <= r and 1 <= MIN <= MAX")
        if self.kind == "dense":
            return self._dense(words, [(r, 1, MIN)], fan_in=MIN)
        return self._ternary(words, (r, 1, MIN), self._sparsity(MIN))

    def draw_b(self, words: np.random.RandomState, r: int, MIN: int, MAX: int) -> np.ndarray:
        """B (MAX, N, r), from the words that follow A's."""
        n = math.ceil(MIN / r)
        if self.kind == "dense":
            return self._dense(words, [(MAX, 1, r)] * n, fan_in=r)
        return self._ternary(words, (MAX, n, r), self._sparsity(MIN))

    def _take(self, words: np.random.RandomState, count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The next `count` words (uint32), chunk by chunk, and where each chunk goes."""
        for start in range(0, count, _CHUNK):
            part = slice(start, min(start + _CHUNK, count))
            chunk = words.randint(0, 2**32, part.stop - part.start, dtype=np.uint32)
            yield part, chunk
            self.advance(chunk.nbytes)

    def _sparsity(self, MIN: int) -> float:
        return 3 if self.kind == "sparse" else math.sqrt(MIN)

    def _dense(
        self, words: np.random.RandomState, blocks: list[tuple[int, int, int]], fan_in: int
    ) -> np.ndarray:
        """Uniform blocks, each drawn by itself, put together on the middle axis and normalised."""
        rows, _, columns = blocks[0]
        dtype, to_dtype = self.rule.dtype, _uniform(self.rule, fan_in)
        result = np.empty((rows, len(blocks), columns), dtype)
        block = np.empty(rows * columns, dtype)
        total = squares = 0.0
        for b in range(len(blocks)):
            for part, chunk in self._take(words, block.size):
                block[part] = to_dtype(chunk)
                exact = block[part].astype(np.float64)
                total += float(exact.sum())
                squares += float(exact @ exact)
            result[:, b] = block.reshape(rows, columns)
        std = dtype.type(_deviation(total, squares, result.size))
        # 16 bits have few patterns: the quotient of each one, computed once.
        with np.errstate(all="ignore"):
            every = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(_F32)
            quotients = (every / _F32.type(std)).astype(dtype).astype(_F32)
            quotients = quotients.astype(self.base_dtype).astype(_F32).astype(dtype)
        table, patterns = quotients.view(np.uint16), result.reshape(-1).view(np.uint16)
        for start in range(0, result.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            patterns[part] = table.take(patterns[part], mode="clip")
        return result

    def _ternary(
        self, words: np.random.RandomState, shape: tuple[int, int, int], s: float
    ) -> np.ndarray:
        """-1, 0 and 1, normalised; float32."""
        signs = np.empty(math.prod(shape), _F32)
        # PEFT compares float32 numbers with Python's, which torch rounds to float32 first.
        low = _F32.type(1 / (2 * s)) * _F32.type(2**24)
        high = _F32.type(1 - 1 / (2 * s)) * _F32.type(2**24)
        total = squares = 0
        for part, chunk in self._take(words, signs.size):
            chunk &= 0xFFFFFF
            up, down = chunk > high, chunk < low
            np.subtract(up, down, out=signs[part], dtype=_F32)
            ups, downs = int(up.sum()), int(down.sum())
            total, squares = total + ups - downs, squares + ups + downs
        entry = 1 / _F32.type(_deviation(total, squares, signs.size))
        signs *= entry.astype(self.base_dtype).astype(_F32)
        return signs.reshape(shape)


def _uniform(rule: _Rule, fan_in: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function from words to uniform numbers in `rule`'s dtype."""
    bound = math.sqrt(3) * (math.sqrt(2 / (1 + math.sqrt(5) ** 2)) / math.sqrt(fan_in))
    low, high = _F32.type(-bound), _F32.type(bound)
    bottom, top = low.astype(rule.dtype), high.astype(rule.dtype)
    if rule.bits < 24:
        low, high = bottom.astype(_F32), top.astype(_F32)
    # In double precision the only rounding is the last, to float32: a fused multiply-add.
    work: type[np.floating] = np.float64 if rule.fused else np.float32
    step, mask = work(high - low) * work(2.0**-rule.bits), (1 << rule.bits) - 1

    def convert(chunk: np.ndarray) -> np.ndarray:
        x = (chunk & mask).view(np.int32).astype(work)
        x *= step
        x += work(low)
        out = x.astype(_F32).astype(rule.dtype)
        if rule.bits == 24:
            patterns = out.view(np.uint16)
            patterns[patterns == top.view(np.uint16)] = bottom.view(np.uint16)
        return out

    if rule.bits == 24:
        return convert
    table = convert(np.arange(mask + 1, dtype=np.uint32))
    return lambda chunk: table.take(chunk & mask, mode="clip")


def _deviation(total: float, squares: float, count: int) -> float:
    """Sample standard deviation (ddof 1)."""
    variance = (squares - total * total / count) / (count - 1) if count > 1 else 0.0
    if not variance > 0:
        raise ConfigError(
            f"{count} random numbers with standard deviation 0 or none: PyTorch's bases of these "
            "extents are not finite"
        )
    return math.sqrt(variance)
