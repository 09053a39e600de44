"""Which layers are adapted, against what PEFT does with the same names and models."""

import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.default_targets import DEFAULT_TARGET_MODULES
from randlora_jax.interop.errors import TargetError
from randlora_jax.interop.targets import (
    default_target_modules,
    inside_saved,
    matches,
    matches_saved,
    saved_modules,
    select,
)
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.torch

# Names and settings chosen to collide often.

PARTS = ["layers", "h", "0", "1", "10", "q", "k", "q_proj", "classifier", "pre_classifier"]
module_names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
target_lists = st.lists(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join), min_size=1, max_size=4
)
patterns = st.sampled_from([r".*q", r".*\.(q|k)", "q", r"layers\.\d+\..*", ".*", "q|k"])
layer_patterns = st.sampled_from(["", "layers", "h", "h|layers", "lay.*", r"layers\.0\.h"])
configs = st.fixed_dictionaries(
    {
        "target_modules": target_lists | patterns,
        "modules_to_save": st.none()
        | st.lists(st.sampled_from(["classifier", "q|k", "q.k", "h"]), max_size=2),
        "layers_to_transform": st.none()
        | st.integers(0, 11)
        | st.lists(st.sampled_from([0, 1, 10]), max_size=2),
        "layers_pattern": st.none() | layer_patterns | st.lists(layer_patterns.filter(bool)),
    }
)


@settings(max_examples=600)
@given(configs, st.lists(module_names, min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore:RandLoraConfig")
def test_matches_is_pefts_rule(fields: dict[str, Any], names: list[str]) -> None:
    ours, theirs = RandLoraConfig(**fields), peft.RandLoraConfig(**fields)
    for name in names:
        assert matches(ours, name) == bool(check_target_module_exists(theirs, name)), name


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.3.mlp.experts.5.q", None, 3),  # the first number counts, not the last
        ("layers.3.q", None, None),  # nothing before "layers": PEFT sees no layer
        ("layers.3.q", "layers", 3),
        ("h.3.q", "h|layers", None),  # PEFT does not group a pattern's alternatives
        ("m.layers.3.q", "h|layers", None),
        ("model.layers.3", None, None),  # a number at the end is not a layer of anything
    ],
)
def test_layer_numbers(name: str, pattern: str | None, index: int | None) -> None:
    leaf = name.split(".")[-1]
    for wanted in range(7):
        fields: Any = {
            "target_modules": [leaf],
            "layers_to_transform": wanted,
            "layers_pattern": pattern,
        }
        assert matches(RandLoraConfig(**fields), name) == (wanted == index)
        theirs = peft.RandLoraConfig(**fields)
        assert bool(check_target_module_exists(theirs, name)) == (wanted == index)


def test_matches_needs_names() -> None:
    for targets in (None, "all-linear"):
        with pytest.raises(TargetError, match="depends on the model"):
            matches(RandLoraConfig(target_modules=targets), "q")


def test_defaults_are_pefts() -> None:
    theirs = TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING
    assert set(DEFAULT_TARGET_MODULES) == set(theirs)
    for model, value in theirs.items():
        assert default_target_modules(model) == (
            value if isinstance(value, str) else tuple(value)
        ), model
    with pytest.raises(TargetError, match=r"'berd' has no default \(near: 'bert'"):
        default_target_modules("berd")
    with pytest.raises(TargetError, match="None has no default"):
        default_target_modules(None)


# Real models, tiny.

BERT = BertConfig(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=8,
)
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, BERT),
    "bert-seq": (BertForSequenceClassification, BERT),
    "bert-tok": (BertForTokenClassification, BERT),
    "bert-qa": (BertForQuestionAnswering, BERT),
    "roberta-seq": (RobertaForSequenceClassification, RobertaConfig(**BERT.to_diff_dict())),
    "distilbert-seq": (
        DistilBertForSequenceClassification,
        DistilBertConfig(vocab_size=12, dim=8, n_layers=1, n_heads=2, hidden_dim=12),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=12, n_embd=8, n_layer=2, n_head=2, n_positions=8),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=12,
            hidden_size=8,
            num_hidden_layers=2,
            ffn_dim=12,
            num_attention_heads=2,
            word_embed_proj_dim=8,
            max_position_embeddings=8,
        ),
    ),
}


def make(model: str) -> torch.nn.Module:
    kind, config = MODELS[model]
    return kind(config)


def what_it_has(model: torch.nn.Module) -> tuple[list[str], list[str], dict[str, Any]]:
    """The arguments of `select` that a front end finds out; containers are left to `select`."""
    modules = dict(model.named_modules())
    linear = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D)]
    other = [n for n, m in modules.items() if n not in linear and not list(m.children()) and n]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    output = next((n for n, m in modules.items() if m is head), None)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return linear, other, {"model_type": model_type, "output_embedding": output}


def both(model: str, **fields: Any) -> tuple[list[str], list[str]]:
    """The layers that we select and those that PEFT wraps."""
    base = make(model)
    linear, other, facts = what_it_has(base)
    ours = select(RandLoraConfig(r=2, **fields), linear, other, **facts)
    wrapped = peft.get_peft_model(base, peft.RandLoraConfig(r=2, **fields))
    return ours, wrapped.base_model.targeted_module_names


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("bert", {}),
        ("bert", {"target_modules": "all-linear"}),
        ("bert", {"target_modules": "ALL-linear", "modules_to_save": ["pooler"]}),
        ("bert", {"target_modules": ["dense"], "modules_to_save": ["output"]}),
        ("bert", {"target_modules": r".*\.(key|intermediate\.dense)"}),
        ("bert", {"target_modules": ["query", "dense"], "layers_to_transform": 1}),
        (
            "bert",
            {"target_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"},
        ),
        ("bert-seq", {"target_modules": "all-linear"}),
        ("bert-seq", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("bert-tok", {"task_type": "TOKEN_CLS"}),
        ("bert-qa", {"task_type": "QUESTION_ANS"}),
        ("roberta-seq", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
        ("distilbert-seq", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        ("opt", {}),
        ("opt", {"target_modules": "all-linear"}),
        ("opt", {"target_modules": ["q_proj", "out_proj", "fc2"]}),
    ],
)
def test_select_takes_the_layers_peft_wraps(model: str, fields: dict[str, Any]) -> None:
    ours, theirs = both(model, **fields)
    assert ours == theirs
    assert ours


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("bert", ["word_embeddings"]),
        ("bert", ["query", "LayerNorm"]),
        ("bert", ["attention"]),  # a container
        ("bert", r".*layer\.0.*"),  # containers and dropout too
        ("bert", ["nothing"]),
        ("bert", ["uery"]),  # a suffix, but not after a dot
        ("bert", "query"),  # an expression that does not match whole names
        ("distilbert-seq", None),  # no default for this model type
    ],
)
def test_select_refuses_what_peft_refuses(model: str, targets: Any) -> None:
    base = make(model)
    linear, other, facts = what_it_has(base)
    with pytest.raises(TargetError):
        select(RandLoraConfig(target_modules=targets), linear, other, **facts)
    with pytest.raises(ValueError):
        peft.get_peft_model(base, peft.RandLoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("model", "task"),
    [("bert-tok", "TOKEN_CLS"), ("bert-qa", "QUESTION_ANS"), ("distilbert-seq", "SEQ_CLS")],
)
def test_heads_are_never_adapted_where_peft_fails_on_them(model: str, task: str) -> None:
    base = make(model)
    linear, other, facts = what_it_has(base)
    fields: Any = {"r": 2, "target_modules": "all-linear", "task_type": task}
    ours = select(RandLoraConfig(**fields), linear, other, **facts)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        peft.get_peft_model(base, peft.RandLoraConfig(**fields))
    # What is left is what PEFT adapts once it is told to leave the heads out.
    heads = [n for n in linear if n not in ours]
    base = make(model)
    wrapped = peft.get_peft_model(base, peft.RandLoraConfig(**fields, modules_to_save=heads))
    assert wrapped.base_model.targeted_module_names == ours
    assert heads


def test_errors_say_what_is_near_and_what_there_is() -> None:
    linear = ["enc.0.query", "enc.0.value", "enc.0.ffn", "head"]
    with pytest.raises(TargetError, match=r"\('qery',\).*Near: 'query'\..*'enc\.0\.ffn'"):
        select(RandLoraConfig(target_modules=["qery"]), linear)
    with pytest.raises(TargetError, match=r"would match 'head', but .* trained whole"):
        select(RandLoraConfig(target_modules=["head"], modules_to_save=["head"]), linear)
    with pytest.raises(TargetError, match=r"but for layers_to_transform=5"):
        select(RandLoraConfig(target_modules=["ffn"], layers_to_transform=5), linear)
    with pytest.raises(TargetError, match=r"takes 'enc': only linear layers"):
        select(RandLoraConfig(target_modules=["enc", "query"]), linear)
    with pytest.raises(TargetError, match="no layer that can be adapted"):
        select(RandLoraConfig(target_modules="all-linear"), [])
    with pytest.raises(TargetError, match="no other linear layer"):
        select(RandLoraConfig(target_modules="all-linear"), ["head"], output_embedding="head")
    with pytest.raises(TargetError, match="layers_to_transform cannot narrow"):
        select(RandLoraConfig(target_modules="all-linear", layers_to_transform=0), linear)


def test_state_space_projections_are_refused() -> None:
    config = RandLoraConfig(target_modules=["in_proj", "out_proj"])
    linear = ["layers.0.in_proj", "layers.0.out_proj"]
    assert select(config, linear, model_type="opt") == linear
    with pytest.raises(TargetError, match=r"'layers\.0\.out_proj'.* model type 'mamba'"):
        select(config, linear, model_type="mamba")


def test_a_target_without_effect_is_reported() -> None:
    linear = ["m.layers.0.q", "m.layers.1.q", "m.head"]
    with pytest.warns(UserWarning, match="'v' adapts no layer: it matches"):
        assert select(RandLoraConfig(target_modules=["q", "v"]), linear) == linear[:2]
    named = ["layers.0.query", "layers.0.value"]
    with pytest.warns(UserWarning, match=r"'vlaue' adapts no layer.* Near: 'value'\."):
        assert select(RandLoraConfig(target_modules=["query", "vlaue"]), named) == named[:1]
    config = RandLoraConfig(target_modules=["q", "m.layers.1.q"], layers_to_transform=0)
    with pytest.warns(UserWarning, match=r"does not keep out 'm\.layers\.1\.q'"):
        assert select(config, linear) == linear[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(RandLoraConfig(target_modules=["q", "head"]), linear)
        select(RandLoraConfig(), ["a.q", "a.v"], model_type="blip-2")  # q_proj is no one's wish


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("bert-seq", "SEQ_CLS"),
        ("roberta-seq", "SEQ_CLS"),
        ("distilbert-seq", "SEQ_CLS"),
        ("bert-tok", "TOKEN_CLS"),
        ("bert-qa", "QUESTION_ANS"),
        ("gpt2", "CAUSAL_LM"),
    ],
)
@pytest.mark.parametrize("more", [None, ["LayerNorm"]])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word_embeddings=True`")
def test_saved_modules_are_what_peft_trains_whole(
    model: str, task: str, more: list[str] | None
) -> None:
    base = make(model)
    linear, _, _ = what_it_has(base)
    targets = [n for n in linear if "class" not in n and "qa" not in n]
    config = RandLoraConfig(target_modules=targets, modules_to_save=more, task_type=task)
    names = [n for n, _ in base.named_parameters()]
    expected = {n for n in names if inside_saved(n.rpartition(".")[0], saved_modules(config))}
    wrapped = peft.get_peft_model(
        base,
        peft.RandLoraConfig(target_modules=targets, modules_to_save=more, task_type=task, r=2),
    )
    trained = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for n, p in wrapped.named_parameters()
        if p.requires_grad and "randlora_" not in n
    }
    assert trained == expected
    assert trained or task == "CAUSAL_LM"


def test_saved_names_are_plain_suffixes() -> None:
    assert matches_saved("bert.pre_classifier", ["classifier"])
    assert not matches_saved("classifier.dense", ["classifier"])
    assert inside_saved("classifier.dense", ["classifier"])
    assert not inside_saved("encoder.dense", ["classifier"])
    config = RandLoraConfig(modules_to_save=["score", "x"], task_type="SEQ_CLS")
    assert saved_modules(config) == ("score", "x", "classifier")


def test_a_name_in_modules_to_save_that_is_no_modules_is_said() -> None:
    config = RandLoraConfig(target_modules=["q"], modules_to_save=["haed", "norm", "layers.0"])
    said = r"modules_to_save: 'haed' names no module, and trains nothing.*'head'"
    with pytest.warns(UserWarning, match=said):
        select(config, ["layers.0.q", "layers.1.q", "head"], ["norm"])
    config = replace(config, modules_to_save=["haed", "nrom"])
    with pytest.warns(UserWarning, match="'haed', 'nrom' name no module, and train nothing"):
        select(config, ["layers.0.q", "head"], ["norm"])
    heads = RandLoraConfig(
        target_modules=["q"], modules_to_save=["classifier", "score"], task_type="SEQ_CLS"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of PEFT's own heads a model has one
        select(heads, ["q", "score"])
