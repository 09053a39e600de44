"""The shared bases: their distribution, independence of extents and settings, digests."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randlora_jax.core.bases import (
    BasisIdentity,
    Extents,
    _words,
    draw,
    prng_key,
    used_extents,
)
from randlora_jax.models.basis_source import pair_extents, stored_pair

KINDS = {"dense": 0.0, "sparse": 3.0, "very_sparse": 8.0}


def identity(kind="dense", key=42, r=5):
    return BasisIdentity("jax", key, kind, r, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_unit_standard_deviation_and_values(kind):
    extents = Extents(400, 20, 3000)
    pair = draw(identity(kind, r=16), extents)
    assert {x.dtype for x in pair} == {np.dtype("bfloat16" if kind == "dense" else "int8")}
    for x in stored_pair(identity(kind, r=16), extents, {}):
        values = np.asarray(x, np.float32)
        assert abs(values.std() - 1) < 0.02 and abs(values.mean()) < 0.02
        distinct = len(np.unique(values))
        assert distinct > 500 if kind == "dense" else distinct == 3


@settings(max_examples=10)
@given(
    st.sampled_from(sorted(KINDS)),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_larger_extents_extend_the_pair(kind, rows, n, columns, more, bases, wider):
    small = draw(identity(kind), Extents(rows, n, columns))
    large = draw(identity(kind), Extents(rows + more, n + bases, columns + wider))
    np.testing.assert_array_equal(large.A[:, :columns], small.A)
    np.testing.assert_array_equal(large.B[:rows, :n], small.B)


def test_other_keys_ranks_and_kinds_give_other_numbers():
    extents = Extents(8, 3, 12)
    first = np.asarray(draw(identity(), extents).B, np.float32)
    assert not np.array_equal(first, np.asarray(draw(identity(key=43), extents).B, np.float32))
    assert not np.array_equal(first, np.asarray(draw(identity("sparse"), extents).B, np.float32))
    # rank 6 does not merely extend rank 5: r is part of the identity
    sixth = np.asarray(draw(identity(r=6), extents).B, np.float32)
    assert not np.array_equal(first, sixth[..., :5])


def test_words_are_those_of_jax_random():
    key = prng_key(-7)
    high, low = jax.random.key_data(key)
    with jax.threefry_partitionable(True):
        expected = jax.random.bits(key, (70, 9), np.uint32)
    places = np.arange(70 * 9, dtype=np.uint32).reshape(70, 9)
    np.testing.assert_array_equal(_words(high, low, places), expected)


def test_the_extents_that_a_matrix_slices():
    assert used_extents((384, 1536), 16) == Extents(1536, 24, 384)
    assert pair_extents([(384, 1536), (1536, 384), (384, 384)], 16) == Extents(1536, 96, 1536)
    assert pair_extents([(5, 7)], 3) == Extents(7, 2, 5)


DIGESTS = r"""
import hashlib, json, sys
import jax
jax.config.update("jax_enable_x64", sys.argv[1] == "64")
if sys.argv[2] == "mesh":
    jax.config.update("jax_threefry_partitionable", False)
from randlora_jax.core.bases import BasisIdentity, Extents
from randlora_jax.models.basis_source import stored_pair
found = {}
for kind, s in (("dense", 0.0), ("sparse", 3.0), ("very_sparse", 8.0)):
    for key in (0, 42, -3, 2**40 + 5):
        identity = BasisIdentity("jax", key, kind, 5, s)
        blob = b"".join(x.tobytes() for x in stored_pair(identity, Extents(40, 13, 64), {}))
        found[f"{kind} {key}"] = hashlib.sha256(blob).hexdigest()[:16]
print(json.dumps(found))
"""


def digests(bits, mode, **env):
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, bits, mode],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "bits, mode, flags",
    [
        ("32", "plain", ""),
        ("64", "plain", ""),
        ("32", "mesh", "--xla_force_host_platform_device_count=8"),
    ],
)
def test_golden_digests(bits, mode, flags):
    """Saved adapters name only a key: these numbers can never change."""
    assert digests(bits, mode, XLA_FLAGS=flags) == GOLDEN


GOLDEN = {
    "dense 0": "bdd70b262e3f86ff",
    "dense 42": "47a79e800d4d5828",
    "dense -3": "14a6b4c882a1c48c",
    "dense 1099511627781": "be6ecffe21b3fab2",
    "sparse 0": "ecbf04c9ba2f5e3d",
    "sparse 42": "ee187bafe98bd7d1",
    "sparse -3": "decd7c9d4afb0a97",
    "sparse 1099511627781": "45aa9000e2329450",
    "very_sparse 0": "5eee70b0eab70145",
    "very_sparse 42": "4dcb27cfff6b993e",
    "very_sparse -3": "282f0fbe36f42ef2",
    "very_sparse 1099511627781": "321ac6a89e587432",
}
