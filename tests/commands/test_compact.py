"""randlora-jax compact, on adapters that PEFT wrote, opened again by PEFT."""

import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from peft_nets import (
    NET_INPUT,
    Net,
    cast,
    is_base,
    jax_adapter,
    keep_bases,
    peft_net,
    peft_settings,
    randomize,
    rewrite,
    run,
    with_adapter_names,
)
from randlora_jax.interop.adapter import bases_digest
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.peft_dir import read_adapter, write_adapter
from randlora_jax.interop.tensor_file import TensorFile
from randlora_jax.interop.torch_rng import generation_of
from torch_files import load_file

from randlora_jax.commands.compact import compact
from randlora_jax.commands.report import Misuse

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import adapter_files

pytestmark = pytest.mark.torch

WEIGHTS = "adapter_model.safetensors"
EVERYTHING = {"bias": "all", "modules_to_save": ["head"]}


def in_peft(directory) -> torch.Tensor:
    return run(peft.PeftModel.from_pretrained(Net(), str(directory)))


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}, EVERYTHING])
def test_one_copy_and_the_trained_numbers_and_nothing_else(tmp_path, kind):
    expected = peft_net(tmp_path / "src", **kind)
    report = compact(tmp_path / "src", tmp_path / "dst")
    assert torch.equal(in_peft(tmp_path / "dst"), expected)

    before, after = tensors_of(tmp_path / "src"), tensors_of(tmp_path / "dst")
    bases = {key for key in after if is_base(key)}
    assert len(bases) == 2
    trained = {key for key in before if not is_base(key) and ".modules_to_save." not in key}
    assert after.keys() - bases == trained
    for key in after:
        assert torch.equal(after[key].float(), before[key].float()), key
    narrow = torch.float32 if "sparse" in str(kind) else torch.bfloat16
    assert {after[key].dtype for key in bases} == {narrow}
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {
        "adapter_config.json",
        WEIGHTS,
    }
    assert report.good and report.data["before"]["copies_of_bases"] == 4
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("src", "dst")]
    assert sizes == [report.data[when]["bytes"] for when in ("before", "after")]


def test_compact_files_stay_as_they_are(tmp_path):
    peft_net(tmp_path / "src")
    compact(tmp_path / "src", tmp_path / "once")
    compact(tmp_path / "once", tmp_path / "twice")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_that_torch_draws_again_are_dropped(tmp_path, kind, dtype):
    model = peft.get_peft_model(
        Net().to(dtype),
        peft_settings(projection_prng_key=2**40 + 5, **{kind: True})
        if kind != "dense"
        else peft_settings(projection_prng_key=2**40 + 5),
    )
    randomize(model)
    model.save_pretrained(tmp_path / "src")
    report = compact(tmp_path / "src", tmp_path / "dst", drop_bases=True)

    assert not any(map(is_base, tensors_of(tmp_path / "dst")))
    found = peft.PeftModel.from_pretrained(Net().to(dtype), str(tmp_path / "dst"))
    with torch.no_grad():
        expected = model.eval()(NET_INPUT.to(dtype))
        assert torch.equal(found.eval()(NET_INPUT.to(dtype)), expected)
    drawn = report.data["drawn_by_torch"]
    assert drawn["key"] == 2**40 + 5
    assert drawn["generation"] == (generation_of(torch.__version__) if kind == "dense" else None)
    assert str(dtype).removeprefix("torch.") in drawn["base_dtypes"]
    if kind != "dense":  # a ternary entry has another value in each dtype
        assert len(drawn["base_dtypes"]) == 1
    assert "first adapter" in report.text
    written = read_adapter(tmp_path / "dst")
    assert not written.config.save_projection
    assert written.provenance.digest == bases_digest(*read_adapter(tmp_path / "src").bases)
    named = drawn["generation"] or kind  # "very_sparse" is not called sparse
    assert written.provenance.source == f"torch:{named}:{drawn['base_dtypes'][0]}:10x10"


def bump(tensors):
    """The next float after one entry of every copy of B."""
    for key, x in tensors.items():
        if key.endswith("randlora_B"):
            x[-1, -1, -1] = np.nextafter(x[-1, -1, -1], np.float32(9))
    return tensors


def test_other_bases_are_not_dropped(tmp_path):
    peft_net(tmp_path / "changed")
    rewrite(tmp_path / "changed", bump)
    write_adapter(tmp_path / "jax", jax_adapter(np.random.default_rng(0)))
    for name in ("changed", "jax"):
        with pytest.raises(AdapterFileError, match="without --drop-bases"):
            compact(tmp_path / name, tmp_path / "dst", drop_bases=True)
        assert not (tmp_path / "dst").exists()
    compact(tmp_path / "changed", tmp_path / "dst")  # what cannot be narrowed is kept whole
    assert read_adapter(tmp_path / "dst").bases[1].dtype == np.float32
    assert torch.equal(in_peft(tmp_path / "dst"), in_peft(tmp_path / "changed"))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_copies_that_differ_are_refused(tmp_path, where):
    peft_net(tmp_path / "src")

    def spoil(tensors):
        copies = sorted(key for key in tensors if key.endswith("randlora_B"))
        tensors[copies[where]][3, 2, 1] *= 1.5
        return tensors

    rewrite(tmp_path / "src", spoil)
    with pytest.raises(AdapterFileError, match="copies of one"):
        compact(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_copies_longer_than_a_block_are_compared_to_the_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("randlora_jax.interop.tensor_file.BLOCK", 48)
    monkeypatch.setattr("randlora_jax.interop.tensor_file.CHUNK", 20)
    peft_net(tmp_path / "src")
    with TensorFile(tmp_path / "src" / WEIGHTS) as file:
        copies = [x for key, x in file.tensors.items() if key.endswith("randlora_B")]
        array = file.read(copies[0])
        assert file.unlike(copies, array) is None
        for at in range(array.size):
            other = array.copy()
            other.reshape(-1)[at] += 1
            assert file.unlike(copies[1:], other) in copies[1:]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: keep_bases(tensors, lambda key: key.startswith("base_model.randlora")),
        lambda tensors: keep_bases(tensors, lambda key: "layer.11" in key),
        with_adapter_names,
    ],
    ids=["top level", "one layer", "adapter names"],
)
def test_every_variant_becomes_one(tmp_path, change):
    expected = peft_net(tmp_path / "plain")
    compact(tmp_path / "plain", tmp_path / "want")
    peft_net(tmp_path / "src")
    rewrite(tmp_path / "src", change)
    compact(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst" / WEIGHTS).read_bytes() == (tmp_path / "want" / WEIGHTS).read_bytes()
    assert torch.equal(in_peft(tmp_path / "dst"), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_widening_is_said(tmp_path, dtype):
    peft_net(tmp_path / "src")
    rewrite(tmp_path / "src", lambda tensors: cast(tensors, dtype))
    report = compact(tmp_path / "src", tmp_path / "dst")
    assert any("widened" in note and np.dtype(dtype).name in note for note in report.data["notes"])
    assert torch.equal(in_peft(tmp_path / "dst"), in_peft(tmp_path / "src"))


def test_nothing_is_overwritten_without_force(tmp_path):
    expected = peft_net(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "README.md").write_text("mine")
    compact(tmp_path / "src", tmp_path / "dst")  # it holds no adapter yet
    old = (tmp_path / "dst" / WEIGHTS).read_bytes()
    with pytest.raises(Misuse, match="--force"):
        compact(tmp_path / "src", tmp_path / "dst", drop_bases=True)
    assert (tmp_path / "dst" / WEIGHTS).read_bytes() == old
    with pytest.raises(Misuse, match="--force"):
        compact(tmp_path / "src", tmp_path / "src")
    with pytest.raises(Misuse, match="a file"):
        compact(tmp_path / "src", tmp_path / "dst" / "README.md", force=True)

    compact(tmp_path / "src", tmp_path / "dst", drop_bases=True, force=True)
    assert torch.equal(in_peft(tmp_path / "dst"), expected)
    assert (tmp_path / "dst" / "README.md").read_text() == "mine"
    compact(tmp_path / "src", tmp_path / "src", force=True)
    assert torch.equal(in_peft(tmp_path / "src"), expected)
    assert sum(map(is_base, tensors_of(tmp_path / "src"))) == 2


def test_memory_is_one_copy_and_one_tensor(tmp_path):
    shapes = adapter_files.llama_3b(layers=1, divisor=4)
    adapter_files.write_as_peft(tmp_path / "src", shapes)
    tensors = adapter_files.peft_tensors(shapes)
    size = (tmp_path / "src" / WEIGHTS).stat().st_size
    assert size - adapter_files.total_bytes(tensors) < 10_000
    copy = 4 * (np.prod(tensors["base_model.randlora_B"]) + 32 * 2048)
    assert size > 8 * copy

    compact(tmp_path / "src", tmp_path / "warm")  # what is imported once is not counted
    for drop in (False, True):
        tracemalloc.start()
        compact(tmp_path / "src", tmp_path / f"dst{drop}", drop_bases=drop)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        trained = size - 8 * copy
        assert peak < (2 if drop else 1) * copy + trained + 4e6
    assert (tmp_path / "dstFalse" / WEIGHTS).stat().st_size < trained + copy / 2 + 10_000
    assert (tmp_path / "dstTrue" / WEIGHTS).stat().st_size < trained + 10_000


def test_the_benchmark_writes_what_peft_writes(tmp_path):
    """The same keys, dtypes, shapes and order, and bases that torch draws."""
    model = torch.nn.Module()
    shapes = adapter_files.llama_3b(layers=1, divisor=64)
    for name, (n_out, n_in) in shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.add_module(leaf, torch.nn.Linear(n_in, n_out))
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    settings = peft.RandLoraConfig(r=adapter_files.RANK, target_modules=targets)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "peft")
    adapter_files.write_as_peft(tmp_path / "ours", shapes)
    with (
        TensorFile(tmp_path / "peft" / WEIGHTS) as theirs,
        TensorFile(tmp_path / "ours" / WEIGHTS) as ours,
    ):
        assert [(x.key, x.code, x.shape) for x in theirs.tensors.values()] == [
            (x.key, x.code, x.shape) for x in ours.tensors.values()
        ]
        for key in filter(is_base, ours.tensors):
            assert ours.holds(ours.tensors[key], theirs.read(theirs.tensors[key])), key
