"""Bases that PEFT casts layer after layer, in models whose layers have several dtypes."""

import itertools
import warnings

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.missing_bases import draw_missing
from torch import nn

pytestmark = pytest.mark.torch

R = 5
KEY = 0  # of which the order of float16 and bfloat16 does not matter
NAMES = {np.float32: "float32", ml_dtypes.bfloat16: "bfloat16", np.float16: "float16"}
DTYPES = {name: np.dtype(x) for x, name in NAMES.items()} | {"float64": np.dtype(np.float64)}
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
ORDERS = [
    *itertools.permutations(["float32", "bfloat16", "float16"], 2),
    ("float32", "float16", "bfloat16"),
    ("bfloat16", "float32", "float16"),
    ("float64", "float32"),
    ("float64", "bfloat16"),
]


def theirs(order, kind, key, size):
    """PEFT's A and B over layers of these dtypes, one after the other."""
    net = nn.Sequential(*(nn.Linear(size, size + 4).to(getattr(torch, name)) for name in order))
    targets = [str(i) for i in range(len(order))]
    fields = {"projection_prng_key": key, "save_projection": False, **KINDS[kind]}
    wrapped = peft.get_peft_model(net, peft.RandLoraConfig(r=R, target_modules=targets, **fields))
    pair = (wrapped.base_model.randlora_A["default"], wrapped.base_model.randlora_B["default"])
    return [x.float().numpy() for x in pair]


def ours(order, kind, key, size, **told):
    config = RandLoraConfig(r=R, target_modules=["0"], projection_prng_key=key, **KINDS[kind])
    adapter = Adapter(config, {"0": (np.ones((R, 1), "f4"), np.ones((1, size), "f4"))})
    dtypes = {DTYPES[name] for name in order}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = draw_missing(adapter, size, size + 4, dtypes, "bf16-24bit", "here", **told)
    return [x.astype(np.float32) for x in found.pair]


def same(one, other):
    return all(map(np.array_equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_coarsest_dtype_lasts(kind, order):
    expected = theirs(order, kind, KEY, 24)
    assert same(ours(order, kind, KEY, 24), expected)
    rounded = {"bfloat16", "float16"} & {*order} and kind != "dense"
    assert same(ours(["float32"], kind, KEY, 24), expected) == (not rounded)


def test_where_their_order_matters_it_is_refused():
    """bfloat16 by way of float16 is another number now and then, and a file tells no order."""
    outcomes = set()
    for key in range(12):
        there, back = (theirs(order, "sparse", key, 40) for order in (
            ("float16", "bfloat16"), ("bfloat16", "float16")
        ))  # fmt: skip
        outcomes.add(same(there, back))
        if same(there, back):
            assert same(ours(("float16", "bfloat16"), "sparse", key, 40), there)
            continue
        with pytest.raises(AdapterFileError, match=r"if float16 comes first, else .*--base-dtype"):
            ours(("float16", "bfloat16"), "sparse", key, 40)
        told = ours(("float16", "bfloat16"), "sparse", key, 40, base_dtype="bfloat16")
        assert same(told, back)
    assert outcomes == {True, False}


def test_dense_bases_too_small_for_float16_are_rounded_by_it():
    """The one case in which a dense draw depends on the dtype: so numbers that small must occur."""
    for order in (("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16")):
        expected = theirs(order, "dense", 0, 1500)
        assert same(ours(order, "dense", 0, 1500), expected)
    assert not same(ours(("float32",), "dense", 0, 1500), expected)
