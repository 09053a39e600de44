"""`randlora-jax convert`: names and bases change, what the adapter computes does not."""

import json

import numpy as np
import peft
import pytest
import torch
from families import twins
from mlp import KINDS, torch_net
from randlora_jax.interop.peft_dir import read_adapter

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.commands.convert import backwards
from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return twins("opt", tmp_path_factory.mktemp("opt"))


@pytest.mark.parametrize("kind", [{}, {"sparse": True}])
def test_missing_bases_are_drawn_and_written(opt, kind, tmp_path, capsys):
    base = type(opt.torch).from_pretrained(opt.path, attn_implementation="eager").eval()
    config = peft.RandLoraConfig(r=8, target_modules=["q_proj"], save_projection=False, **kind)
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "randlora_lambda" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "src")
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    assert main(["convert", src, dst, "--to", "jax"]) == 2  # the extents are the base model's
    assert "--base" in capsys.readouterr().err
    generation = [] if kind else ["--torch-generation", "bf16-24bit"]
    command = ["convert", src, dst, "--to", "jax", "--base", opt.path, *generation]
    assert main(command) == 0
    assert "bases drawn as torch:" in capsys.readouterr().out
    ours = RandLoraModel.from_pretrained(opt.flax, dst)  # no generation to choose, no warning
    expected = opt.torch_logits(theirs)
    assert np.abs(opt.flax_logits(ours) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert main(command) == 2 and main([*command, "--force"]) == 0


def test_names_go_there_and_back(tmp_path, capsys):
    make, run, randomise = KINDS["linen"]
    config = RandLoraConfig(
        r=5, randlora_alpha=10, target_modules=["tall", "wide"], modules_to_save=["head"]
    )
    model = get_peft_model(make(torch_net()), config)
    randomise(model, np.random.default_rng(0))
    model.save_pretrained(tmp_path / "jax")
    rules = {"(tall|wide|head)": r"net.blocks.\1.linear"}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    common = ["--names", str(tmp_path / "rules.json")]
    there, back = str(tmp_path / "torch"), str(tmp_path / "back")
    assert main(["convert", str(tmp_path / "jax"), there, "--to", "torch", *common]) == 0
    adapter = read_adapter(there)
    assert set(adapter.layers) == {"net.blocks.tall.linear", "net.blocks.wide.linear"}
    assert set(adapter.saved) == {"net.blocks.head.linear.weight", "net.blocks.head.linear.bias"}
    assert main(["convert", there, back, "--to", "jax", *common]) == 0
    again = RandLoraModel.from_pretrained(make(torch_net()), back)
    np.testing.assert_array_equal(run(again), run(model))
    assert main(["convert", back, str(tmp_path / "x"), "--to", "torch"]) == 2
    assert "nothing to convert" in capsys.readouterr().err


def test_rules_read_backwards():
    assert backwards({r"layers/(\d+)/attn/q": r"model.layers.\1.self_attn.q_proj"}) == {
        r"model\.layers\.(\d+)\.self_attn\.q_proj": r"layers/\1/attn/q"
    }
    for pattern, name in [(r"a.*", "b"), (r"(a)(b)", r"\2.\1"), (r"(a)", "b")]:
        with pytest.raises(Exception, match="plain text and groups"):
            backwards({pattern: name})
