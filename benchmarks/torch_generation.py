"""Which algorithm does the installed torch draw RandLoRA bases by?

    python benchmarks/torch_generation.py            # name it
    python benchmarks/torch_generation.py --speed    # and time torch against ours

Draws as PEFT does but needs torch alone, so it runs in a bare environment with any release. The
digests are those stored in tests/interop/test_torch_rng.py. Exit status 1: torch draws in no way
we know.
"""

import argparse
import functools
import hashlib
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from randlora_jax.interop.torch_rng import TorchDraw, identify, torch_bases

Pair = tuple[torch.Tensor, torch.Tensor]

KEYS = (0, 42, 2**40 + 5, -3)
EXTENTS = (10, 384, 392)  # r, MIN, MAX
SPEED_EXTENTS = (32, 4096, 14336)


def dense(dtype: torch.dtype, key: int, r: int, MIN: int, MAX: int) -> Pair:
    """PEFT's dense bases, drawn in `dtype`."""
    generator = torch.Generator(device="cpu").manual_seed(key)

    def uniform(*shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = uniform(r, 1, MIN)
    b = torch.cat([uniform(MAX, 1, r) for _ in range(math.ceil(MIN / r))], dim=1)
    return a / a.std(), b / b.std()


def sparse(key: int, r: int, MIN: int, MAX: int) -> Pair:
    """PEFT's sparse bases (s = 3)."""
    generator = torch.Generator(device="cpu").manual_seed(key)
    a = torch.rand((r, 1, MIN), generator=generator)
    b = torch.rand((MAX, math.ceil(MIN / r), r), generator=generator)
    a, b = ((x > 1 - 1 / 6).float() - (x < 1 / 6).float() for x in (a, b))
    return a / a.std(), b / b.std()


DRAWS: dict[str, Callable[..., Pair]] = {
    "bfloat16": functools.partial(dense, torch.bfloat16),
    "float16": functools.partial(dense, torch.float16),
    "sparse": sparse,
}


def digest(pair: Pair) -> str:
    """First 16 hex digits of the sha256 over the bytes of A, then B."""
    parts = (x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in pair)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def recognise(pair: Pair, key: int) -> TorchDraw | None:
    """How we say that torch drew `pair`; its bits go over as float32, which holds them all."""
    a, b = pair
    return identify(a.float().numpy(), b.float().numpy(), key)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def speed(repeats: int = 7) -> None:
    """Prints median times, torch and ours taking turns."""
    for name in ("bfloat16", "sparse"):
        found = recognise(DRAWS[name](0, *EXTENTS), 0)
        assert found is not None
        theirs = functools.partial(DRAWS[name], 0, *SPEED_EXTENTS)
        ours = functools.partial(
            torch_bases, 0, *SPEED_EXTENTS, kind=found.kind, generation=found.generation
        )
        times = [(seconds(theirs), seconds(ours)) for _ in range(repeats)]
        t, o = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:9} {SPEED_EXTENTS}: torch {t:.2f} s, ours {o:.2f} s, ratio {o / t:.2f}")


def main() -> int:
    """Prints what each draw of the installed torch is; 1 if any is unknown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", action="store_true", help="time torch against ours")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    unknown = 0
    for name, draw in DRAWS.items():
        for key in KEYS:
            pair = draw(key, *EXTENTS)
            how = recognise(pair, key)
            found = "UNKNOWN" if how is None else how.generation or how.kind
            print(f"  {name:9} key {key:13}  {digest(pair)}  {found}")
            unknown += how is None
    if args.speed:
        speed()
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
