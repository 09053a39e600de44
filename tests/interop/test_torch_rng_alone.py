"""PyTorch's bases in NumPy where no PyTorch is: what it drew once, and what is refused."""

import hashlib
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.torch_rng import (
    Generation,
    generation_of,
    identify,
    torch_bases,
    word_bytes,
)

KINDS = ("dense", "sparse", "very_sparse")
NEWEST = "bf16-24bit"
TOGETHER = (10, 384, 392)  # extents of the stored digests

# Printed by benchmarks/torch_generation.py under torch 2.11.0+cu130, the last of its generation;
# 2.2.2, 2.3.1, 2.5.1 to 2.10.0 gave the same numbers (docs/torch-generations.md).
OLD_DIGESTS = {
    ("bf16-8bit", 0): "14e9aed58faefb31",
    ("bf16-8bit", 42): "55136c4d642d7413",
    ("bf16-8bit", 2**40 + 5): "e152704bbeebb3c1",
    ("bf16-8bit", -3): "29ea39cf7e11bef9",
    ("f16-11bit", 0): "32df49116ddaf02e",
    ("f16-11bit", 42): "5a0e40d4af980024",
    ("f16-11bit", 2**40 + 5): "b95670e0af720b25",
    ("f16-11bit", -3): "5b05102517235b04",
}


def digest(pair: tuple[np.ndarray, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(x.tobytes() for x in pair)).hexdigest()[:16]


@pytest.mark.parametrize(("generation", "key"), OLD_DIGESTS)
def test_stored_digests_of_the_older_generation(generation, key):
    assert (
        digest(torch_bases(key, *TOGETHER, generation=generation)) == (OLD_DIGESTS[generation, key])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_results_own(kind):
    tracemalloc.start()
    try:
        pair = torch_bases(0, 64, 512, 6000, kind=kind, generation=NEWEST)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One block of B and some chunks beside the result, which is 6 MB dense and 12 MB sparse.
    assert peak < sum(x.nbytes for x in pair) + 5e6


def draws() -> list[tuple[str, Generation | None, type]]:
    """Every way to draw that gives these extents and key numbers of their own."""
    f32, f16, bf16 = np.float32, np.float16, ml_dtypes.bfloat16
    dense = [("dense", generation, f32) for generation in Generation]
    dense += [("dense", g, bf16) for g in Generation if g.startswith("f16")]
    dense += [("dense", g, f16) for g in Generation if g.startswith("bf16-24bit")]
    return dense + [(kind, None, t) for kind in KINDS[1:] for t in (f32, bf16, f16)]


@pytest.mark.parametrize(("kind", "generation", "base_dtype"), draws())
def test_identify_names_every_way_to_draw(kind, generation, base_dtype):
    a, b = torch_bases(5, *TOGETHER, kind=kind, generation=generation, base_dtype=base_dtype)
    draw = (kind, generation, np.dtype(base_dtype))
    assert identify(a, b, 5) == draw
    assert identify(a.astype(np.float32), b.astype(np.float32), 5 + 2**32) == draw
    assert identify(a, b, 6) is None
    almost = b.copy()
    almost[-1, -1, -1] = np.nextafter(almost[-1, -1, -1], almost.dtype.type(9))
    assert identify(a, almost, 5) is None
    alone = identify(a, None, 5)
    assert alone is not None and alone.kind == kind


def test_identify_rejects_what_torch_cannot_have_drawn():
    a, b = torch_bases(0, 8, 24, 40, generation=NEWEST)
    assert identify(a, b, 0) is not None
    assert identify(a[:, 0], b, 0) is None
    assert identify(a, b[:, :-1], 0) is None
    assert identify(a, b[:20], 0) is None
    assert identify(a[:0], b, 0) is None
    assert identify(a, b, 2**64) is None
    assert identify(np.full_like(a, np.nan), b, 0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "generation None.*bf16-8bit"),
        ({"generation": "bf16"}, "generation 'bf16'.*bf16-8bit"),
        ({"kind": "thin"}, "kind 'thin'"),
        ({"generation": NEWEST, "base_dtype": np.float64}, "base dtype float64"),
        ({"generation": NEWEST, "MAX": 23}, "MIN 24, MAX 23"),
        ({"generation": NEWEST, "r": 0}, "r 0"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        torch_bases(**{"key": 0, "r": 8, "MIN": 24, "MAX": 40, **arguments})


@pytest.mark.parametrize(
    ("version", "generation"),
    [
        ("2.2.2+cu121", "bf16-8bit"),
        ("2.11.0", "bf16-8bit"),
        ("2.12.0", "bf16-24bit"),
        ("2.13.0+cpu", "bf16-24bit"),
        ("2.13.0a0+gitabc", "bf16-24bit"),
    ],
)
def test_generation_of_a_release(version, generation):
    assert generation_of(version) == generation


def test_generation_of_a_release_nobody_ran_yet_warns():
    with pytest.warns(UserWarning, match=r"torch 3\.0\.0 is newer"):
        assert generation_of("3.0.0") == "bf16-24bit"


@pytest.mark.parametrize("version", ["2.1.2", "2.12.0.dev20260101", "2.12.0rc1", "latest"])
def test_generation_of_nothing_known_refuses(version):
    with pytest.raises(ConfigError, match=version.replace(".", r"\.")):
        generation_of(version)


def test_dense_bases_have_unit_deviation_and_the_older_ones_few_values():
    old = torch_bases(0, *TOGETHER, generation="bf16-8bit")[1]
    new = torch_bases(0, *TOGETHER, generation="bf16-24bit")[1]
    assert len(np.unique(old.astype(np.float32))) <= 256 < len(np.unique(new.astype(np.float32)))
    for b in (old, new):
        assert b.dtype == ml_dtypes.bfloat16
        assert math.isclose(b.astype(np.float64).std(), 1, rel_tol=4e-3)


def test_progress_ends_where_it_was_said_to():
    for kind in ("dense", "sparse"):
        told = []
        torch_bases(3, 5, 12, 40, kind=kind, generation="bf16-24bit", advance=told.append)
        assert sum(told) == word_bytes(5, 12, 40)
