"""PyTorch's bases in NumPy, against the installed torch and PEFT, to the last bit."""

import hashlib
import math
import os
import platform
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from peft import RandLoraConfig as PeftConfig
from peft import get_peft_model
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.torch_rng import (
    Generation,
    generation_of,
    identify,
    torch_bases,
    word_bytes,
)
from torch import nn

pytestmark = pytest.mark.torch

KEYS = (0, 42, 2**40 + 5, -3)
EXTENTS = ((8, 24, 40), (10, 33, 33), (7, 30, 96), (40, 33, 50))  # r, MIN, MAX; r divides 24 alone
KINDS = ("dense", "sparse", "very_sparse")
BASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = generation_of(torch.__version__)
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


def peft_bases(
    key: int, r: int, MIN: int, MAX: int, kind: str, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The buffers of a PEFT model with these extents, as it computes with them."""
    base = nn.Sequential(nn.Linear(MIN, MAX), nn.Linear(MAX, 1)).to(dtype)
    config = PeftConfig(
        r=r,
        target_modules=["0"],
        projection_prng_key=key,
        sparse=kind == "sparse",
        very_sparse=kind == "very_sparse",
    )
    model = get_peft_model(base, config).base_model
    a, b = model.randlora_A["default"], model.randlora_B["default"]
    assert a.dtype == b.dtype == torch.float32
    return a.numpy(), b.numpy()


def ours(
    key: int, r: int, MIN: int, MAX: int, kind: str, dtype: torch.dtype, generation: str
) -> tuple[np.ndarray, np.ndarray]:
    base_dtype = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}.get(
        dtype, np.float32
    )
    return torch_bases(key, r, MIN, MAX, kind=kind, generation=generation, base_dtype=base_dtype)


def assert_same(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Every bit of the float32 values, signs of zeros included."""
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(
            x.astype(np.float32).view(np.uint32), y.view(np.uint32), strict=True
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extents", EXTENTS)
@pytest.mark.parametrize("key", KEYS)
def test_equal_to_peft(key, extents, kind):
    theirs = peft_bases(key, *extents, kind, torch.float32)
    assert_same(ours(key, *extents, kind, torch.float32, INSTALLED), theirs)


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_peft_for_each_base_dtype(kind, dtype):
    theirs = peft_bases(5, *TOGETHER, kind, dtype)
    assert_same(ours(5, *TOGETHER, kind, dtype, INSTALLED), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_dtype_matters_where_it_says_so(kind):
    wide, half, brain = (
        ours(5, *TOGETHER, kind, dtype, "bf16-24bit")[1].astype(np.float32)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    assert (wide != half).any()  # dense: by one entry of this draw, too small for float16
    assert (wide != brain).any() == (kind != "dense")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_peft_where_one_block_is_many_chunks(kind):
    extents = (24, 100, 9000)
    theirs = peft_bases(7, *extents, kind, torch.float32)
    assert_same(ours(7, *extents, kind, torch.float32, INSTALLED), theirs)


@pytest.mark.parametrize("dtype", BASE_DTYPES, ids=str)
def test_equal_to_peft_where_it_finds_no_bfloat16(monkeypatch, dtype):
    monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda: False)
    theirs = peft_bases(42, 16, 160, 700, "dense", dtype)
    generation = {Generation.BF16_8BIT: "f16-11bit"}.get(INSTALLED, "f16-24bit")
    pair = ours(42, 16, 160, 700, "dense", dtype, generation)
    assert {x.dtype for x in pair} == {np.dtype(np.float16)}
    assert_same(pair, theirs)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 processors may lack FMA")
@pytest.mark.skipif(INSTALLED != "bf16-24bit", reason="no other draw depends on it")
def test_equal_to_torch_without_fused_multiply_add():
    code = """
import hashlib, math, torch
for dtype in (torch.bfloat16, torch.float16):
    generator = torch.Generator().manual_seed(42)
    draw = lambda *shape: torch.nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=dtype), a=math.sqrt(5), generator=generator)
    a = draw(10, 1, 384)
    b = torch.cat([draw(392, 1, 10) for _ in range(39)], dim=1)
    raw = b"".join((x / x.std()).view(torch.int16).numpy().tobytes() for x in (a, b))
    print(hashlib.sha256(raw).hexdigest()[:16])
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    mine = [digest(torch_bases(42, *TOGETHER, generation=f"{t}-24bit-no-fma")) for t in TYPES]
    assert run.stdout.split() == mine
    fused = [digest(torch_bases(42, *TOGETHER, generation=f"{t}-24bit")) for t in TYPES]
    assert not set(mine) & set(fused)


TYPES = ("bf16", "f16")


@pytest.mark.parametrize(("generation", "key"), OLD_DIGESTS)
def test_stored_digests_of_the_older_generation(generation, key):
    assert (
        digest(torch_bases(key, *TOGETHER, generation=generation)) == (OLD_DIGESTS[generation, key])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_results_own(kind):
    tracemalloc.start()
    try:
        pair = torch_bases(0, 64, 512, 6000, kind=kind, generation=INSTALLED)
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
    a, b = torch_bases(0, 8, 24, 40, generation=INSTALLED)
    assert identify(a, b, 0) is not None
    assert identify(a[:, 0], b, 0) is None
    assert identify(a, b[:, :-1], 0) is None
    assert identify(a, b[:20], 0) is None
    assert identify(a[:0], b, 0) is None
    assert identify(a, b, 2**64) is None
    assert identify(np.full_like(a, np.nan), b, 0) is None


def test_keys_agree_with_torch():
    pair = torch_bases(-3, 8, 24, 40, generation=INSTALLED)
    assert_same(pair, peft_bases(2**64 - 3, 8, 24, 40, "dense", torch.float32))
    for key in (2**64, -(2**63) - 1):
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(key)
        with pytest.raises(ConfigError, match=str(key)):
            torch_bases(key, 8, 24, 40, generation=INSTALLED)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("kind", "r", "MIN", "MAX"), [("dense", 1, 1, 4), ("sparse", 1, 2, 9)])
def test_refuses_where_torch_is_not_finite(kind, r, MIN, MAX):
    a, b = peft_bases(1, r, MIN, MAX, kind, torch.float32)
    assert not (np.isfinite(a).all() and np.isfinite(b).all())
    with pytest.raises(ConfigError, match="not finite"):
        torch_bases(1, r, MIN, MAX, kind=kind, generation=INSTALLED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "generation None.*bf16-8bit"),
        ({"generation": "bf16"}, "generation 'bf16'.*bf16-8bit"),
        ({"kind": "thin"}, "kind 'thin'"),
        ({"generation": INSTALLED, "base_dtype": np.float64}, "base dtype float64"),
        ({"generation": INSTALLED, "MAX": 23}, "MIN 24, MAX 23"),
        ({"generation": INSTALLED, "r": 0}, "r 0"),
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
