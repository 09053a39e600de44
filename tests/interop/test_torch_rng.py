"""PyTorch's bases in NumPy, against the installed torch and PEFT, to the last bit."""

import hashlib
import os
import platform
import subprocess
import sys

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
    torch_bases,
)
from torch import nn

pytestmark = pytest.mark.torch

KEYS = (0, 42, 2**40 + 5, -3)
EXTENTS = ((8, 24, 40), (10, 33, 33), (7, 30, 96), (40, 33, 50))  # r, MIN, MAX; r divides 24 alone
KINDS = ("dense", "sparse", "very_sparse")
BASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = generation_of(torch.__version__)
TOGETHER = (10, 384, 392)  # extents of the stored digests


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
