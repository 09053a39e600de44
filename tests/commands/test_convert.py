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
from randlora_jax.commands.report import Misuse

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


RULES = {
    "no expression": {r"model/layers/(\d+/x": "y"},
    "no such group": {r"model/decoder/layers/(\d+)/self_attn/q_proj": r"m.\2.q"},
    "no such group of an idle rule": {r".*": r"m.\g<0>", "x(y)": r"\g<z>"},
    "an empty part": {r"model/decoder/layers/(\d+)/.*": r"a..\1"},
    "a slash at the end": {r"model/decoder/layers/(\d+)/.*": r"a/\1/"},
    "nothing": {r"model/decoder/layers/(\d+)/.*": ""},
    "a line break": {r"model/decoder/layers/(\d+)/.*": "a\\1\nb"},
    "a tuner's own word": {r"model/decoder/layers/(\d+)/.*": r"a.randlora_b.\1"},
    "the braces of a stack": {r"model/decoder/layers/(\d+)/.*": r"a.\1.{}"},
    "no name": {r"model/decoder/layers/(\d+)/.*": [r"a.\1"]},
    "an expression too large": {"a{99999999999999999999}": "y"},
}


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("to", ["torch", "jax"])
def test_rules_that_are_none_are_shown(opt, how, to, tmp_path, capsys):
    config = RandLoraConfig(r=8, target_modules=["q_proj"])
    get_peft_model(opt.flax, config).save_pretrained(tmp_path / "src")
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES[how]))
    command = ["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", to]
    status = main([*command, "--names", str(rules)])
    said = capsys.readouterr().err
    assert status in (1, 2)
    assert any(repr(rule) in said for rule in RULES[how]) and not (tmp_path / "out").exists()


BACKWARDS = {
    "groups in groups": {r"model/(layers/(\d+))/x": r"\1.\2"},
    "unnamed groups": {r"model/layers/(?:\d+)": "x"},
    "two of one name": {"a": "x", "b": "x"},
    "an expression in a group that is none": {"a(+)": r"\1"},
}


@pytest.mark.parametrize("how", BACKWARDS)
def test_rules_that_cannot_be_read_backwards_are_refused(how):
    with pytest.raises(Misuse, match=r"backwards"):
        backwards(BACKWARDS[how])


def test_what_is_written_names_its_layers_in_full(opt, tmp_path):
    base = type(opt.torch).from_pretrained(opt.path)
    config = peft.RandLoraConfig(
        r=8, target_modules=["q_proj"], layers_to_transform=[1], save_projection=False
    )
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "src")
    command = ["convert", str(tmp_path / "src"), str(tmp_path / "out"), "--to", "jax"]
    generation = ["--torch-generation", "bf16-24bit"]
    assert main([*command, "--base", opt.path, *generation]) == 0
    config = read_adapter(tmp_path / "out").config
    assert config.target_modules == r"model\.decoder\.layers\.1\.self_attn\.q_proj"
    assert config.layers_to_transform is None
