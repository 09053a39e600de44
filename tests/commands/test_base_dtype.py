"""The dtype of training decides what sparse bases are, and a file without them may not say it."""

import json

import numpy as np
import pytest
import torch
from peft_side import load, save_adapter, save_base, save_both
from randlora_jax.interop.peft_dir import read_adapter
from torch_files import load_file

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

KINDS = {"sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


def adapter(folder, kind, stored, trained, **more):
    """PEFT's model in the dtype `trained`, over a checkpoint stored in another; both on disk."""
    save_base("llama", folder / "base", stored)
    settings = {"save_projection": False, "target_modules": ["q_proj", "down_proj"], **more}
    return save_adapter(
        "llama", folder / "base", folder / "adapter", trained, **KINDS.get(kind, {}), **settings
    )


def deltas(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").float()
        for name, module in model.named_modules()
        if hasattr(module, "randlora_lambda")
    }


def run(command, folder, *more):
    out = [] if command in ("verify", "inspect") else [str(folder / "out"), "--force"]
    out += {"to-lora": ["--rank", "99"], "convert": ["--to", "torch"]}.get(command, [])
    return main(
        [command, str(folder / "adapter"), "--base", str(folder / "base"), *out, *map(str, more)]
    )


def lora(folder):
    got = load_file(folder / "out/adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): got[
            key.replace("lora_A", "lora_B")
        ]
        @ value
        for key, value in got.items()
        if "lora_A" in key
    }


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k] - x).abs().max() / x.abs().max()) for k, x in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stored", "trained"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["trained-in-float32", "trained-in-bfloat16"],
)
def test_every_command_says_what_it_assumes_and_takes_what_it_is_told(
    kind, stored, trained, tmp_path, capsys
):
    expected = deltas(adapter(tmp_path, kind, stored, trained))
    name = str(trained).removeprefix("torch.")

    assert run("to-lora", tmp_path) == 0
    said = capsys.readouterr().err
    assert f"assuming {str(stored).removeprefix('torch.')}" in said and "--base-dtype" in said
    assert furthest(lora(tmp_path), expected) > 2e-5
    assert run("to-lora", tmp_path, "--base-dtype", name) == 0
    assert "assuming" not in capsys.readouterr().err
    assert furthest(lora(tmp_path), expected) <= 1e-5

    assert run("verify", tmp_path, "--base-dtype", name, "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)["differences"]
    assert {x["what"] for x in found if x["kind"] == "delta_W"} == expected.keys()
    assert "assuming" not in captured.err
    assert run("verify", tmp_path) == 0  # PEFT on the stored dtype, as we assume
    assert "assuming" in capsys.readouterr().err


def test_merge_and_convert_take_it_too(tmp_path, capsys):
    model = adapter(tmp_path, "sparse", torch.bfloat16, torch.float32)
    assert run("merge", tmp_path, "--base-dtype", "float32") == 0
    base, merged = (load_file(tmp_path / x / "model.safetensors") for x in ("base", "out"))
    for name, delta in deltas(model).items():
        key = f"{name}.weight"
        sums = (base[key].float() + delta).bfloat16()
        assert float((merged[key] - sums).float().abs().max()) <= 2e-2 * float(sums.abs().max())
        assert (merged[key] == sums).float().mean() > 0.99  # the rest lies between two numbers

    (tmp_path / "out").rename(tmp_path / "merged")
    assert run("convert", tmp_path, "--base-dtype", "float32") == 0
    theirs = model.base_model.randlora_B["default"].numpy()
    np.testing.assert_array_equal(read_adapter(tmp_path / "out").bases[1], theirs)
    assert run("inspect", tmp_path, "--base-dtype", "float32") == 0
    assert "assuming" not in capsys.readouterr().err


@pytest.mark.parametrize("second", [0, 1])
def test_of_layers_in_several_dtypes_the_coarsest_counts(second, tmp_path, capsys):
    """PEFT casts the one pair that they share layer after layer."""
    save_base("llama", tmp_path / "base")
    model = load("llama", tmp_path / "base")
    model.model.layers[second].to(torch.bfloat16)
    config = {"target_modules": ["q_proj", "down_proj"], "sparse": True, "save_projection": False}
    expected = deltas(save_both(model, tmp_path, **config))
    assert run("to-lora", tmp_path) == 0
    assert "assuming bfloat16, " in capsys.readouterr().err
    assert furthest(lora(tmp_path), expected) <= 1e-5


def test_dense_bases_may_depend_on_it_in_float16_alone(tmp_path, capsys):
    model = adapter(tmp_path, "dense", torch.float16, torch.float32)
    theirs = model.base_model.randlora_A["default"].numpy()
    for told in (), ("--base-dtype", "float32"):
        assert run("convert", tmp_path, "--torch-generation", "bf16-24bit", *told) == 0
        assert ("rounds dense ones" in capsys.readouterr().err) == (not told)
        ours = read_adapter(tmp_path / "out").bases[0].astype(np.float32)
        np.testing.assert_array_equal(ours, theirs)  # here float16 happens to hold them


def test_it_is_refused_where_nothing_is_drawn(tmp_path, capsys):
    adapter(tmp_path, "sparse", torch.float32, torch.float32, save_projection=True)
    for command in ("to-lora", "merge", "convert", "verify", "inspect"):
        for told in (("--base-dtype", "float32"), ("--torch-generation", "bf16-8bit")):
            assert run(command, tmp_path, *told) == 2
            assert "holds its bases" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(tmp_path / "adapter"), "--base-dtype", "float32"]) == 2
    assert "--base MODEL_DIR" in capsys.readouterr().err


def test_what_compact_dropped_and_recorded_needs_no_telling(tmp_path, capsys):
    """The record names the dtype, and its digest proves it, whatever the checkpoint's is."""
    model = adapter(tmp_path, "sparse", torch.bfloat16, torch.float32, save_projection=True)
    small = str(tmp_path / "small")
    assert main(["compact", str(tmp_path / "adapter"), small, "--drop-bases"]) == 0
    (tmp_path / "adapter").rename(tmp_path / "full")
    (tmp_path / "small").rename(tmp_path / "adapter")
    assert run("to-lora", tmp_path) == 0
    assert furthest(lora(tmp_path), deltas(model)) <= 1e-5
    assert run("verify", tmp_path) == 0
    assert "assuming" not in capsys.readouterr().err
    assert run("to-lora", tmp_path, "--base-dtype", "bfloat16") == 1
    assert "not those it was trained on" in capsys.readouterr().err
