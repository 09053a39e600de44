"""An adapter whose two files promise different things is refused by name, or a warning says so."""

import json
import warnings

import numpy as np
import peft
import pytest
import torch
from peft_nets import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Net,
    change_config,
    peft_net,
    randomize,
    rewrite,
    run,
    without,
)
from randlora_jax.interop.adapter import Adapter
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError
from randlora_jax.interop.peft_dir import read_adapter
from randlora_jax.interop.promises import BaseNames, check, settled_config
from randlora_jax.interop.targets import by_full_names, full_names
from safetensors.numpy import load_file

pytestmark = pytest.mark.torch


def refused(folder, *parts: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        read_adapter(folder)
    assert str(folder) in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# --- layers ---------------------------------------------------------------------------------------

NARROWER = {
    "a name less": {"target_modules": ["layer.2", "layer.10"]},
    "an expression": {"target_modules": r"layer\.(2|10)"},
    "full names": {"target_modules": r"layer\.10|layer\.2"},
    "layers": {"target_modules": ["2", "10", "11"], "layers_to_transform": [0]},
    "trained whole": {"modules_to_save": ["layer.11"]},
    "a head of the task": {"modules_to_save": ["11"], "task_type": "CAUSAL_LM"},
}


@pytest.mark.parametrize("how", NARROWER)
def test_tensors_of_layers_that_the_config_does_not_name(tmp_path, how):
    output = peft_net(tmp_path)
    change_config(tmp_path, **NARROWER[how])
    refused(tmp_path, "layer.11", "target_modules")
    if "modules_to_save" not in NARROWER[how] and how != "layers":  # where PEFT opens it at all
        theirs = run(peft.PeftModel.from_pretrained(Net(), tmp_path))
        assert (theirs - output).abs().max() > 1e-3, "PEFT does not pass them over"


def test_full_names_promise_each_layer(tmp_path):
    peft_net(tmp_path)
    names = ["layer.10", "layer.11", "layer.2"]
    change_config(tmp_path, target_modules=by_full_names(names))
    assert sorted(read_adapter(tmp_path).layers) == names
    rewrite(tmp_path, without("layer.11."))
    refused(tmp_path, "expected tensors of 'layer.11'")


@pytest.mark.parametrize("names", [["a.b", "a.c|d", r"x.\y"], ["a"], ["b.0.(q)", "b.1.q-k"]])
def test_full_names_are_read_back(names):
    assert full_names(by_full_names(names)) == tuple(sorted(names))


@pytest.mark.parametrize("targets", [None, ["a"], r".*q", r"a|(b)", r"b\.c|a\.b"])
def test_other_targets_are_no_full_names(targets):
    assert full_names(targets) == ()


def test_a_listed_name_without_a_layer_is_said(tmp_path):
    peft_net(tmp_path)
    rewrite(tmp_path, without("layer.11."))
    with pytest.warns(UserWarning, match=r"names 'layer\.11', and the file has no layer .*--base"):
        read_adapter(tmp_path)


class Experts(torch.nn.Module):
    """Three layers of two experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        make = lambda: torch.nn.ModuleDict({"w1": torch.nn.Linear(7, 7)})  # noqa: E731
        self.model = torch.nn.ModuleDict()
        self.model["layers"] = torch.nn.ModuleList(
            torch.nn.ModuleDict({"experts": torch.nn.ModuleList([make(), make()])})
            for _ in range(3)
        )

    def forward(self, x):
        for layer in self.model["layers"]:
            x = sum(expert["w1"](x) for expert in layer["experts"]).tanh()
        return x


NAMES = [f"model.layers.{i}.experts.{k}.w1" for i in range(3) for k in range(2)]


def config_of(**settings) -> RandLoraConfig:
    return RandLoraConfig(target_modules=["w1"], **settings)


def test_layers_as_older_releases_counted_them():
    """PEFT up to 0.19 took expert 1 of all layers, 0.20 and later take all experts of layer 1."""
    trained = [name for name in NAMES if ".experts.1." in name]
    with pytest.warns(UserWarning, match=r"here: layers_to_transform=\(1,\) fits .* up to 0\.19"):
        settled = settled_config(config_of(layers_to_transform=[1]), trained, "here")
    assert full_names(settled.target_modules) == tuple(trained)
    assert settled.layers_to_transform is None and settled.layers_pattern is None
    for pattern in ("experts", ["experts", "layers"]):  # the same number in all releases
        config = config_of(layers_to_transform=[1], layers_pattern=pattern)
        assert settled_config(config, trained, "here") is config
    deep = ["model.layers.0.layers.1.w1", "model.layers.1.layers.1.w1"]
    with pytest.warns(UserWarning, match=r"up to 0\.19"):
        config = config_of(layers_to_transform=1, layers_pattern="layers")
        assert full_names(settled_config(config, deep, "here").target_modules) == tuple(deep)


def test_layers_as_the_installed_release_counts_them():
    settings = peft.RandLoraConfig(r=2, target_modules=["w1"], layers_to_transform=[1])
    now = peft.get_peft_model(Experts(), settings).base_model.targeted_module_names
    config = config_of(layers_to_transform=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settled_config(config, now, "here") is config
    assert list(now) == [name for name in NAMES if "layers.1." in name]
    with pytest.raises(AdapterFileError, match=r"layers_to_transform=\(1,\) .*layers\.0\.experts"):
        settled_config(config, [*now, NAMES[0]], "here")


def adapter_of(config: RandLoraConfig, names, saved=()) -> Adapter:
    arrays = np.ones((2, 2), np.float32), np.ones((2, 4), np.float32)
    return Adapter(config, dict.fromkeys(names, arrays), {key: np.ones(1) for key in saved})


def base_of(names, tensors=(), *, is_whole=True) -> BaseNames:
    return BaseNames(tensors, names, is_whole)


def test_a_base_model_tells_which_layers_are_missing():
    plain = config_of()
    assert check(adapter_of(plain, NAMES), "here", base_of(NAMES)).config is plain
    with pytest.raises(
        AdapterFileError, match=r"expected tensors of 'model\.layers\.2\.experts\.1"
    ):
        check(adapter_of(plain, NAMES[:-1]), "here", base_of(NAMES))
    inside = config_of(modules_to_save=["layers.2"])  # trained whole, so not adapted
    saved = [f"{name}.weight" for name in NAMES[4:]]
    check(adapter_of(inside, NAMES[:4], saved), "here", base_of(NAMES))


def test_of_two_readings_the_base_model_tells_which_one_is_meant():
    """Experts 0 and 1 of layers 0 and 1: every release takes these, today's takes expert 2, too."""
    names = [f"model.layers.{i}.experts.{k}.w1" for i in range(2) for k in range(3)]
    trained = [name for name in names if "experts.2" not in name]
    adapter = adapter_of(config_of(layers_to_transform=[0, 1]), trained)
    with pytest.warns(UserWarning, match=r"up to 0\.19"):
        found = check(adapter, "here", base_of(names))
    assert full_names(found.config.target_modules) == tuple(trained)


# --- what is trained whole ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_module_that_is_missing(tmp_path, bias):
    peft_net(tmp_path, modules_to_save=["head"], bias=bias)
    rewrite(tmp_path, without("head."))
    refused(tmp_path, "expected tensors of 'head'", "modules_to_save")
    with pytest.raises(KeyError, match="head"):
        peft.PeftModel.from_pretrained(Net(), tmp_path)


@pytest.mark.parametrize("lost", ["head.dense.bias", "head.norm.weight"])
def test_half_a_module_is_missing(tmp_path, lost):
    peft_net(tmp_path, modules_to_save=["head"])
    rewrite(tmp_path, without(lost))
    with pytest.raises(KeyError, match=lost):
        peft.PeftModel.from_pretrained(Net(), tmp_path)
    adapter = read_adapter(tmp_path)  # the file alone cannot tell
    for is_whole in (True, False):
        with pytest.raises(AdapterFileError, match=f"expected 'head.*{lost.split('.')[-1]}'"):
            check(adapter, "here", base_of([], Net().state_dict(), is_whole=is_whole))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_head_that_a_task_implies(task):
    head = "qa_outputs" if task == "QUESTION_ANS" else "score"
    config = config_of(task_type=task)
    for base in (None, base_of(NAMES, [f"{head}.weight"]), base_of(NAMES, is_whole=False)):
        with pytest.raises(AdapterFileError, match=f"expected tensors of .*'{head}'"):
            check(adapter_of(config, NAMES), "here", base)
        check(adapter_of(config, NAMES, [f"{head}.weight"]), "here", base)
    check(adapter_of(config, NAMES), "here", base_of(NAMES, ["classification_head.weight"]))
    own = config_of(task_type=task, modules_to_save=["classification_head"])
    check(adapter_of(own, NAMES, ["classification_head.weight"]), "here", None)


def test_a_checkpoint_may_have_more_than_the_adapters_class():
    config = config_of(task_type="SEQ_CLS", bias="all", modules_to_save=["pooler", "norm"])
    saved = ["score.weight", "score.bias", "layers.0.norm.weight", "layers.0.q.bias", "pooler.bias"]
    names = {*saved, "pre_classifier.weight", "cls.dense.bias"}
    adapter = adapter_of(config, NAMES, saved)
    check(adapter, "here", base_of(NAMES, names, is_whole=False))
    for more in ("pooler.weight", "layers.1.norm.weight", "layers.1.q.bias"):
        with pytest.raises(AdapterFileError, match=f"expected '{more}'"):
            check(adapter, "here", base_of(NAMES, {*names, more}, is_whole=False))
    for more in ("pre_classifier.weight", "cls.dense.bias"):  # of its very class
        with pytest.raises(AdapterFileError, match=f"expected '{more}'"):
            check(adapter, "here", base_of(NAMES, {*saved, more}))


# --- biases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_that_older_releases_did_not_save(tmp_path, bias):
    peft_net(tmp_path, bias=bias, modules_to_save=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(tmp_path)
    lost = [key for key in load_file(tmp_path / WEIGHTS) if "base_layer.bias" in key]
    assert len(lost) == 3
    rewrite(tmp_path, without(*lost))
    with pytest.warns(UserWarning, match=f"bias='{bias}' says .* the file has none"):
        adapter = read_adapter(tmp_path)
    with pytest.warns(UserWarning, match="the file has none"):
        check(adapter, "here", base_of(adapter.layers, Net().state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such a model has none
        check(adapter, "here", base_of(adapter.layers, ["layer.2.weight"]))


def test_some_biases_only(tmp_path):
    peft_net(tmp_path, bias="all")
    rewrite(tmp_path, without("layer.10.base_layer.bias"))
    adapter = read_adapter(tmp_path)  # another layer of that size might have none
    for is_whole in (True, False):
        with pytest.raises(AdapterFileError, match=r"expected 'layer\.10\.bias', since bias='all'"):
            check(adapter, "here", base_of(adapter.layers, Net().state_dict(), is_whole=is_whole))
    config = config_of(bias="randlora_only")  # layers that are alike
    with pytest.raises(AdapterFileError, match=r"expected 'model\.layers\.1\.experts\.1\.w1\.bias"):
        saved = [f"{name}.base_layer.bias" for name in NAMES if name != NAMES[3]]
        check(adapter_of(config, NAMES, saved), "here", None)


STRAY = {
    "of a layer that is not adapted": ("head.dense.base_layer.bias", "head.dense.bias"),
    "beside the adapted layer": ("layer.10.bias", "layer.10.base_layer.bias"),
}


@pytest.mark.parametrize("where", STRAY)
def test_a_bias_where_peft_does_not_look(tmp_path, where):
    key, right = STRAY[where]
    peft_net(tmp_path, bias="all")
    rewrite(tmp_path, lambda t: {k: x for k, x in t.items() if k != PREFIX + right})
    rewrite(tmp_path, lambda t: t | {PREFIX + key: np.ones(4 if "head" in key else 10, "f4")})
    refused(tmp_path, key, right)


def test_a_bias_of_another_layer_than_the_adapted_ones(tmp_path):
    peft_net(tmp_path, bias="randlora_only")
    rewrite(tmp_path, lambda t: t | {f"{PREFIX}head.dense.bias": np.ones(4, "f4")})
    refused(tmp_path, "head.dense.bias", "bias='randlora_only'")


# --- fields that nobody here knows ----------------------------------------------------------------

NEUTRAL = {
    "use_dora": False,
    "alpha_pattern": {},
    "rank_pattern": None,
    "exclude_modules": [],
    "runtime_config": {"ephemeral_gpu_offload": False},
}
ARITHMETIC = {
    "use_dora": True,
    "use_rslora": 1,
    "rank_pattern": {"q": 4},
    "alpha_pattern": {"q": 4},
    "lora_bias": True,
    "scaling": "sqrt",
    "exclude_modules": "head",
    "target_parameters": ["w"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 4]],
}


def test_neutral_fields_are_kept_without_a_word(tmp_path):
    peft_net(tmp_path)
    change_config(tmp_path, **NEUTRAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = read_adapter(tmp_path).config.to_dict()
    assert {name: values[name] for name in NEUTRAL} == NEUTRAL


@pytest.mark.parametrize("field", ARITHMETIC)
def test_unknown_fields_that_change_an_update_are_refused(tmp_path, field):
    peft_net(tmp_path)
    change_config(tmp_path, **{field: ARITHMETIC[field]})
    refused(tmp_path, CONFIG, f"{field}: expected null, false or nothing, found")


def test_peft_passes_such_a_field_over(tmp_path):
    """So its output is not what another program's adapter computes."""
    output = peft_net(tmp_path)
    change_config(tmp_path, use_dora=True)
    with pytest.warns(UserWarning, match="use_dora"):
        torch.testing.assert_close(run(peft.PeftModel.from_pretrained(Net(), tmp_path)), output)


# --- nesting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["auto_mapping", "note", "target_modules", "modules_to_save"])
@pytest.mark.parametrize("depth", [65, 500, 900])
def test_what_is_nested_too_deep_is_refused(tmp_path, field, depth):
    peft_net(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    values.pop(field, None)
    one, end = ("[", "]") if "modules" in field else ('{"a":', "}")
    nested = f"{one * depth}1{end * depth}"
    (tmp_path / CONFIG).write_text(f'{json.dumps(values)[:-1]}, "{field}": {nested}}}')
    refused(tmp_path, CONFIG, field, "nested")


def test_what_is_nested_a_little_is_kept(tmp_path):
    peft_net(tmp_path)
    deep: object = 1
    for _ in range(60):
        deep = {"a": deep}
    change_config(tmp_path, auto_mapping=deep, note=deep)
    with pytest.warns(UserWarning, match="unknown fields 'note'"):
        config = read_adapter(tmp_path).config
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert written["auto_mapping"] == deep and written["note"] == deep
    for _ in range(5):
        deep = {"a": deep}
    for field in ("auto_mapping", "unknown"):
        with pytest.raises(ValueError, match=f"{field}: expected at most 64 levels"):
            RandLoraConfig(**{field: {"a": deep}})


def test_expressions_are_checked_as_peft_uses_them(tmp_path):
    model = peft.get_peft_model(Net(), peft.RandLoraConfig(r=3, target_modules=["layer.2"]))
    randomize(model)
    model.save_pretrained(tmp_path)
    for field, value in {
        "modules_to_save": ["(?i)head"],
        "layers_pattern": "(?P<layer>h)",
        "target_modules": "a{99999999999999999999}",
    }.items():
        change_config(tmp_path, **{"layers_to_transform": [0], field: value})
        refused(tmp_path, CONFIG, field, "a valid regular expression")
        model.save_pretrained(tmp_path)
