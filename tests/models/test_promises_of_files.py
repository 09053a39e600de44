"""What a file promises of a model is there, or `from_pretrained` and `load_adapter` refuse it."""

import json
import warnings

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from families import WIDTHS, twins
from flax import nnx
from peft_nets import CONFIG, PREFIX, WEIGHTS, change_config, rewrite, without
from peft_side import load, save_adapter, save_both
from randlora_jax.interop.peft_dir import read_adapter
from safetensors.numpy import load_file

from randlora_jax import (
    AdapterFileError,
    ConfigError,
    RandLoraConfig,
    RandLoraModel,
    TargetError,
    get_peft_model,
)

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return twins("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def adapter(bert, tmp_path, request):
    settings = {"target_modules": ["query", "value"], "bias": getattr(request, "param", "none")}
    save_adapter("bert", bert.path, tmp_path, **settings)
    return tmp_path


all_biases = pytest.mark.parametrize("adapter", ["all"], indirect=True)


def refused(bert, folder, *words) -> None:
    """By both ways in, and the model stays as it was."""
    opened = get_peft_model(bert.flax, RandLoraConfig(r=5, target_modules=["key"]))
    for call in (
        lambda: RandLoraModel.from_pretrained(bert.flax, folder),
        lambda: opened.load_adapter(folder, "second"),
    ):
        with pytest.raises(AdapterFileError) as caught:
            call()
        assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value
    assert list(opened.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("lost", "named"),
    {
        "classifier": "expected tensors of 'classifier' or 'score'",
        "classifier.bias": "expected 'classifier.bias'",
        "classifier.weight": "expected 'classifier.weight'",
        "layer.1.attention.self.value.randlora": "bert.encoder.layer.1.attention.self.value",
        "value.randlora": "expected tensors of 'bert.encoder.layer.0.attention.self.value'",
    }.items(),
)
def test_what_a_file_lost_is_named(bert, adapter, lost, named):
    rewrite(adapter, without(lost))
    refused(bert, adapter, named)


@all_biases
@pytest.mark.parametrize("lost", ["bert.encoder.layer.0.output.dense", "bert.pooler.dense"])
def test_a_bias_that_a_file_lost_is_named(bert, adapter, lost):
    rewrite(adapter, without(f"{lost}.bias"))
    refused(bert, adapter, f"expected '{lost}.bias'")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_modules": ["query"]}, "target_modules=('query',)"),
        ({"layers_to_transform": [0]}, "layers_to_transform=(0,)"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"query": 3}}, "rank_pattern"),
        ({"modules_to_save": ["pooler", "classifier"]}, "expected tensors of 'pooler'"),
    ],
)
def test_what_a_config_says_otherwise_is_named(bert, adapter, change, named):
    change_config(adapter, **change)
    refused(bert, adapter, named)


@all_biases
def test_biases_that_a_file_never_had_are_said(bert, adapter):
    rewrite(
        adapter,
        lambda t: {k: x for k, x in t.items() if k[-5:] != ".bias" or "classifier" in k},
    )
    with pytest.warns(UserWarning, match="bias='all' says .* the file has none") as caught:
        RandLoraModel.from_pretrained(bert.flax, adapter)
    assert [warning.filename for warning in caught] == [__file__]
    change_config(adapter, bias="randlora_only")
    with pytest.warns(UserWarning, match="bias='randlora_only' says"):
        RandLoraModel.from_pretrained(bert.flax, adapter)


def test_a_bias_of_two_names(tmp_path):
    """PEFT writes both names of BERT's bias over the vocabulary; both ways it is one."""
    config = transformers.BertConfig(**WIDTHS, intermediate_size=52, max_position_embeddings=40)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    theirs = save_both(model, tmp_path, target_modules=["query"], bias="all")
    carried = [key for key in load_file(tmp_path / "adapter" / WEIGHTS) if "predictions" in key]
    assert PREFIX + "cls.predictions.decoder.bias" in carried
    flax = transformers.FlaxBertForMaskedLM.from_pretrained(tmp_path / "base", from_pt=True)
    ours = RandLoraModel.from_pretrained(flax, tmp_path / "adapter")
    ours.save_pretrained(tmp_path / "ours")
    base = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    ids = np.arange(3, 11)[None]
    with torch.no_grad():
        expected, back = (m(torch.tensor(ids)).logits.numpy() for m in (theirs, again))
    np.testing.assert_allclose(back, expected, rtol=0, atol=0)
    found = np.asarray(ours(ids).logits)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "lm_head"]), ("opt", ["q_proj"])]
)
def test_what_peft_carries_of_the_base_model_stays_the_base_models(family, targets, tmp_path):
    """An adapted head's weight, both sides of tied embeddings: in PEFT, too, they are frozen."""
    pair = twins(family, tmp_path / "base")
    theirs = save_adapter(family, pair.path, tmp_path, target_modules=targets)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    carried = [k for k in load_file(tmp_path / "theirs" / WEIGHTS) if k.endswith("weight")]
    assert len(carried) == (2 if family == "opt" else 1) and any(
        "lm_head" in key for key in carried
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = RandLoraModel.from_pretrained(pair.flax, tmp_path / "theirs", is_trainable=True)
    trained, _ = ours.split()
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(trained)[0]}
    assert names == {"randlora_lambda", "randlora_gamma"}
    expected = pair.torch_logits(theirs)
    np.testing.assert_allclose(
        pair.flax_logits(ours), expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )
    ours.merge_adapter()  # the adapted head's weight is written as it was
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load(family, pair.path), tmp_path / "ours").eval()
    np.testing.assert_array_equal(pair.torch_logits(again), expected)
    before, written = (load_file(tmp_path / who / WEIGHTS) for who in ("theirs", "ours"))
    back = [key for key in carried if family == "llama" or "embed_tokens" in key]
    assert back and all(np.array_equal(before[key], written[key]) for key in back)


def test_a_model_without_such_a_head_needs_none(tmp_path):
    """As PEFT, which finds no module of that name; what is saved promises nothing idle."""

    class Net(nnx.Module):
        def __init__(self):
            self.up, self.top = (nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(2))

    config = RandLoraConfig(
        r=2, target_modules=["up"], modules_to_save=["top", "tpo"], task_type="SEQ_CLS"
    )
    with pytest.warns(UserWarning, match="'tpo' names no module, and trains nothing"):
        model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path, names={"(.*)": r"\1"})
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["modules_to_save"] == ["top", "classifier", "score"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RandLoraModel.from_pretrained(Net(), tmp_path)
    with pytest.raises(AdapterFileError, match="'classifier' or 'score'"):
        read_adapter(tmp_path)  # a model in PyTorch may have one


# --- torch_generation -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"sparse": True}])
def test_an_unknown_generation_is_refused(bert, tmp_path, kind):
    save_adapter("bert", bert.path, tmp_path, save_projection=False, **kind)
    for name in ("newest", "", 24, "bf16"):
        with pytest.raises(ConfigError, match="bf16-8bit, bf16-24bit"):
            RandLoraModel.from_pretrained(bert.flax, tmp_path, torch_generation=name)


# --- names ----------------------------------------------------------------------------------------


class Two(nnx.Module):
    def __init__(self):
        self.up, self.down = (nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.down(self.up(x))


RULES = {
    "no expression": ({"(up": "up"}, ConfigError),
    "no such group": ({"(up)": r"\2"}, TargetError),
    "no such named group": ({"(up)": r"\g<x>"}, TargetError),
    "an empty part": ({"up": "a..b"}, TargetError),
    "a line break": ({"up": "a\nb"}, TargetError),
    "a terminal's command": ({"up": "a\x1b[2Jb"}, TargetError),
    "a tuner's own word": ({"up": "a.randlora_b"}, TargetError),
    "an attribute in braces": ({"up": "a{0.real}b"}, TargetError),
    "no text": ({"up": 3}, ConfigError),
    "no dict": ("up", ConfigError),
    "nothing": ({"p": "q"}, ConfigError),
}


@pytest.mark.parametrize("how", RULES)
def test_names_that_no_reader_opens(tmp_path, how):
    names, error = RULES[how]
    config = RandLoraConfig(r=2, target_modules=["up", "down"])
    with pytest.raises(error, match="names"):
        get_peft_model(Two(), config, names=names)
    model = get_peft_model(Two(), config)
    with pytest.raises(error, match="names"):
        model.save_pretrained(tmp_path / "out", names=names)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", names={"(.*)": r"net/\1"})
    with pytest.raises(error, match="names"):
        RandLoraModel.from_pretrained(Two(), tmp_path / "out", names=names)
    again = RandLoraModel.from_pretrained(Two(), tmp_path / "out", names={"(.*)": r"net/\1"})
    x = np.ones((2, 6), np.float32)
    np.testing.assert_array_equal(jax.device_get(again(x)), jax.device_get(model(x)))
