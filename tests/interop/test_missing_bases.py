"""Bases that a file lacks are drawn as PyTorch drew them, or an error says what to do."""

import warnings
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError
from randlora_jax.interop.missing_bases import DrawnPair, draw_missing
from randlora_jax.interop.torch_rng import Generation, identify, torch_bases, torch_draw

KEY, R, MIN, MAX = 11, 3, 8, 12
F32, BF16, F16 = map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16))
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


def adapter(kind: str, provenance: Provenance | None = None) -> Adapter:
    config = RandLoraConfig(
        r=R,
        target_modules=["q"],
        projection_prng_key=KEY,
        save_projection=False,
        projection_source="torch",
        **KINDS[kind],
    )
    layers = {"q": (np.ones((R, 3), np.float32), np.ones((3, MIN), np.float32))}
    return Adapter(config, layers, provenance=provenance)


def drawn(kind: str, generation: Generation | None, dtype: np.dtype) -> DrawnPair:
    pair = torch_bases(KEY, R, MIN, MAX, kind=kind, generation=generation, base_dtype=dtype)
    return DrawnPair(pair, torch_draw(kind, generation, dtype))


def same(found: DrawnPair, expected: DrawnPair) -> bool:
    return all(map(np.array_equal, found.pair, expected.pair)) and found.draw == expected.draw


def draw(case: Adapter, dtypes=(F32,), generation=None, **told) -> DrawnPair:
    return draw_missing(case, MIN, MAX, dtypes, generation, "here", **told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("generation", [Generation.BF16_8BIT, Generation.F16_24BIT])
def test_what_was_recorded_is_drawn_again(kind, dtype, generation):
    was = drawn(kind, generation if kind == "dense" else None, dtype)
    recorded = was.provenance(KEY, {"q": (MAX, MIN)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw(adapter(kind, recorded))
    assert all(map(np.array_equal, found.pair, was.pair))
    assert found.draw == identify(*was.pair, KEY)
    others = {bases_digest(*drawn(kind, was.draw.generation, x).pair): x for x in (F32, BF16, F16)}
    del others[recorded.digest]
    assert others or generation == Generation.BF16_8BIT  # 8 bits fit all three
    for other in others.values():
        with pytest.raises(AdapterFileError, match=r"those it was trained on.*--torch-generation"):
            draw(adapter(kind, recorded), base_dtype=other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_record_names_kind_or_generation_dtype_and_extents(kind, dtype):
    generation = Generation.BF16_8BIT if kind == "dense" else None
    named = F32 if (kind, dtype) == ("dense", BF16) else dtype
    label = drawn(kind, generation, dtype).provenance(KEY, {}).source
    assert label == f"torch:{generation or kind}:{named}:{MAX}x{MIN}"


@pytest.mark.parametrize("generation", Generation)
def test_one_pair_has_one_name(generation):
    dtype = BF16 if "bf16" in generation else F16
    assert same(drawn("dense", generation, dtype), drawn("dense", generation, F32))
    assert torch_draw("dense", generation, dtype) == torch_draw("dense", generation, F32)


def test_an_unknown_draw_is_assumed_with_one_warning_or_chosen():
    with pytest.warns(UserWarning, match="here holds a key.*assuming bf16-24bit") as caught:
        found = draw(adapter("dense"), (BF16, F32))
    assert same(found, drawn("dense", Generation.BF16_24BIT, BF16))
    assert [warning.filename for warning in caught] == [__file__]
    chosen = draw(adapter("dense"), generation="bf16-8bit")
    assert same(chosen, drawn("dense", Generation.BF16_8BIT, F32))
    with pytest.raises(ConfigError, match=r"torch generation '2\.13'.*bf16-8bit"):
        draw(adapter("dense"), generation="2.13")


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
def test_sparse_bases_have_no_generation(kind):
    for generation in (None, "bf16-8bit"):
        assert same(draw(adapter(kind), (F16, F32), generation), drawn(kind, None, F16))


def test_a_given_generation_counts_more_than_the_recorded_one():
    recorded = drawn("dense", Generation.BF16_8BIT, F32).provenance(KEY, {})
    with pytest.raises(AdapterFileError, match=r"as bf16-24bit, .*'torch:bf16-8bit:float32:12x8'"):
        draw(adapter("dense", recorded), generation="bf16-24bit")
    wrong = replace(recorded, source="torch:bf16-24bit:float32")
    right = draw(adapter("dense", wrong), generation="bf16-8bit")
    assert right.draw.generation == Generation.BF16_8BIT


def test_old_files_call_very_sparse_bases_sparse():
    was = drawn("very_sparse", None, F32)
    recorded = replace(was.provenance(KEY, {}), source="torch:sparse:float32:12x8")
    assert same(draw(adapter("very_sparse", recorded)), was)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("jax", "expected bases in the file.*'jax'; found none"),
        ("file:0123456789abcdef", "expected bases in the file"),
        ("torch:bf16-99bit:float32", "'torch:bf16-99bit:float32'; expected one of.*upgrade"),
    ],
)
def test_what_pytorch_does_not_draw_is_refused(source, message):
    recorded = replace(drawn("dense", Generation.BF16_8BIT, F32).provenance(KEY, {}), source=source)
    with pytest.raises(AdapterFileError, match=message):
        draw(adapter("dense", recorded))


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@pytest.mark.parametrize("told", ["float16", BF16, np.float32])
def test_a_dtype_that_is_told_counts(kind, told):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw(adapter(kind), (F32, F16), base_dtype=told)
    assert same(found, drawn(kind, None, np.dtype(told)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_dtype_that_is_assumed_is_said_where_it_matters(kind, dtype):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(adapter(kind), (dtype,), None if kind != "dense" else "bf16-24bit")
    told = [str(warning.message) for warning in caught]
    assert len(told) == (kind != "dense" or dtype == F16)
    assert all(f"assuming {dtype}, " in text and "--base-dtype chooses" in text for text in told)


def test_other_dtypes_round_nothing():
    for dtype in map(np.dtype, (np.float64, np.int8)):
        assert same(draw(adapter("sparse"), (dtype,)), drawn("sparse", None, F32))


@pytest.mark.parametrize("told", ["fp16", "float64", np.int8, object(), {"a": 1}, "bf16"])
def test_what_no_base_model_is_trained_in_is_refused(told):
    with pytest.raises(ConfigError, match=r"base_dtype .*one of float32, float16, bfloat16"):
        draw(adapter("sparse"), base_dtype=told)


@pytest.mark.parametrize("last", [BF16, F16])
def test_16_bits_of_the_other_kind_survive_those_of_a_draw(last):
    """So of a dense pair, whatever the order of its layers, one dtype decides."""
    first = F16 if last == BF16 else BF16
    with np.errstate(all="ignore"):
        drawn = np.arange(1 << 16, dtype=np.uint16).view(first).astype(np.float32)
        rounded = drawn.astype(last).astype(np.float32)
        again = rounded.astype(first).astype(np.float32)
    sound = np.isfinite(rounded) & np.isfinite(again)
    assert sound.sum() > 30000 and (rounded != drawn)[sound].any()
    np.testing.assert_array_equal(again[sound], rounded[sound])
