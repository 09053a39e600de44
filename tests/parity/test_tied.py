"""Weights that PyTorch's modules share, trained whole: refused where PEFT computes otherwise."""

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from zoo import FAMILIES, IDS, mend_clip, twins

from randlora_jax import ConfigError, RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.front_ends.linen.tied import tied_modules
from randlora_jax.models import known_models

pytestmark = pytest.mark.torch

MASKED = ["albert", "bert", "big_bird", "roberta", "roberta_prelayernorm", "roformer"]
MASKED += ["distilbert", "electra", "xlm-roberta"]
OTHERS = ["GPT2Model", "T5Model", "BartModel", "BartForSequenceClassification", "BartForCausalLM"]
OTHERS += ["T5EncoderModel", "ElectraForPreTraining", "BertForPreTraining", "BertLMHeadModel"]


def classes():
    """(PyTorch class, family) of all models whose ties are looked at."""
    found = [(family.torch_class, name) for name, family in FAMILIES.items()]
    for name in MASKED:
        stem = FAMILIES[name].torch_class.removesuffix("ForSequenceClassification")
        found.append((f"{stem}ForMaskedLM", name))
    families = {"GPT2": "gpt2", "T5": "t5", "Bart": "bart", "Electra": "electra", "Bert": "bert"}
    for name in OTHERS:
        (family,) = (f for stem, f in families.items() if name.startswith(stem))
        found.append((name, family))
    return found


def shared_weights(model):
    """The modules of a PyTorch model that hold one parameter, for each that several hold."""
    holders = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, set()).add(name)
    return {frozenset(names) for names in holders.values() if len(names) > 1}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("name", "family"), classes())
def test_the_ties_are_pytorchs(name, family, tied):
    if family == "gptj" and tied:
        pytest.skip("Flax's GPT-J cannot run with a tied head")
    mend_clip()
    config, options = FAMILIES[family].make(), {"_do_init": False}
    parts = (getattr(config, side, None) for side in ("decoder", "text_config"))
    if any(hasattr(part, "model_type") for part in parts):
        if not tied or family != "encoder-decoder":
            pytest.skip("the ties of a model of two are its decoder's")
        options = {}
    else:
        config.tie_word_embeddings = tied
    flax_name = f"Flax{name.replace('BertLMHeadModel', 'BertForCausalLM')}"
    flax = getattr(hf, flax_name)(config, **options)
    shapes = flax.params_shape_tree if options else flax.params
    found = {frozenset(group) for group in tied_modules(flax_name, config, flatten_dict(shapes))}
    if config.model_type in ("llama", "mistral"):  # Flax's have a head of their own all the same
        assert not found
    else:
        assert found == shared_weights(getattr(hf, name)(config))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return twins("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return twins("bart", tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    mend_clip()
    return twins("t5", tmp_path_factory.mktemp("t5"))


REFUSED = {
    "gpt2": [["wte"], ["lm_head"], ["wte", "lm_head"], ["transformer.wte"], ["transformer"]],
    "bart": [["shared"], ["embed_tokens"], ["lm_head"], ["decoder"], ["model"]],
    "t5": [["shared"], ["encoder.embed_tokens"]],  # its head has weights of its own
}
LAYERS = {"gpt2": ["c_attn"], "bart": ["q_proj"], "t5": ["q", "v"]}
EMBEDDING = {"gpt2": ("transformer", "wte", "embedding"), "t5": ("shared", "embedding")}


def moved(peft_model):
    """What PEFT trains of a model, moved away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return peft_model


def trained_in_peft(pair, name, saved, folder):
    """A fresh PyTorch model that PEFT trained so, and saved."""
    model = type(pair.torch).from_pretrained(pair.path, attn_implementation="eager")
    settings = {"r": 4, "randlora_alpha": 8, "target_modules": LAYERS[name]}
    theirs = peft.get_peft_model(model, peft.RandLoraConfig(**settings, modules_to_save=saved))
    moved(theirs).save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    ("name", "saved"), [(name, saved) for name, sets in REFUSED.items() for saved in sets]
)
def test_a_shared_weight_trained_whole_is_refused(name, saved, request):
    pair = request.getfixturevalue(name)
    config = RandLoraConfig(r=4, target_modules=LAYERS[name], modules_to_save=saved)
    model = get_peft_model(pair.flax, RandLoraConfig(r=4, target_modules=LAYERS[name]))
    for call in (lambda: get_peft_model(pair.flax, config), lambda: model.add_adapter("b", config)):
        with pytest.raises(ConfigError, match=r"share one weight.*tied.*leave it out") as caught:
            call()
        assert saved[0] in str(caught.value)
        assert ("lm_head" in str(caught.value)) == (name != "t5")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("name", "saved"), [("gpt2", "wte"), ("gpt2", "lm_head"), ("t5", "shared")]
)
def test_pefts_own_is_refused_since_it_computes_otherwise(name, saved, request, tmp_path):
    pair = request.getfixturevalue(name)
    theirs = trained_in_peft(pair, name, [saved], tmp_path)
    with pytest.raises(ConfigError, match=r"share one weight") as caught:
        RandLoraModel.from_pretrained(pair.flax, tmp_path)
    assert str(tmp_path) in str(caught.value)

    # were it read into the one array that Flax has, the logits would be others
    (copy,) = (x for key, x in theirs.named_parameters() if "modules_to_save" in key)
    params = flatten_dict(pair.flax.params)
    params[EMBEDDING[name]] = copy.detach().numpy()
    with torch.no_grad():
        for parameter in (p for key, p in theirs.named_parameters() if "randlora_lambda" in key):
            parameter.zero_()
    inputs = {key: np.asarray(x) for key, x in pair.family.inputs.items()}
    flax = np.asarray(pair.flax(**inputs, params=unflatten_dict(params)).logits)
    expected = pair.torch_output(theirs)
    assert np.abs(flax - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"]])
def test_with_a_head_of_its_own_it_is_trained_as_in_peft(saved, tmp_path):
    config = hf.GPT2Config(**FAMILIES["gpt2"].make().to_diff_dict())
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    base = hf.GPT2LMHeadModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    flax = hf.FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "base", from_pt=True)
    settings = {"r": 4, "randlora_alpha": 8, "target_modules": ["c_attn"]}
    theirs = peft.get_peft_model(base, peft.RandLoraConfig(**settings, modules_to_save=saved))
    moved(theirs).save_pretrained(tmp_path / "theirs")
    ours = RandLoraModel.from_pretrained(flax, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_without_a_head_nothing_is_shared(tmp_path):
    torch.manual_seed(0)
    base = hf.GPT2Model(FAMILIES["gpt2"].make()).eval()
    base.save_pretrained(tmp_path / "base")
    flax = hf.FlaxGPT2Model.from_pretrained(tmp_path / "base", from_pt=True)
    settings = {"r": 4, "randlora_alpha": 8, "target_modules": ["c_attn"]}
    theirs = peft.get_peft_model(base, peft.RandLoraConfig(**settings, modules_to_save=["wte"]))
    moved(theirs).save_pretrained(tmp_path / "theirs")
    ours = RandLoraModel.from_pretrained(flax, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


KNOWN = {
    "tunix.models.llama3.model.Llama3": "model.embed_tokens",
    "tunix.models.gemma3.model.Gemma3": "model.language_model.embed_tokens",  # it sees
}


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_nnx_model_without_a_head_shares_its_embedding(name, head):
    """Built as tunix's are: with tied embeddings they have no `lm_head`."""

    class Embedder(nnx.Module):
        def __init__(self):
            self.input_embedding = nnx.Param(np.ones((31, 8), np.float32))

    class Model(nnx.Module):
        def __init__(self):
            self.config = SimpleNamespace(vision_config={})
            self.embedder = Embedder()
            self.proj = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            if head:
                self.lm_head = nnx.Linear(8, 31, rngs=nnx.Rngs(0))

    Model.__module__, _, Model.__qualname__ = name.rpartition(".")
    assert known_models.about(Model()).info.model_type
    for saved in ("embed_tokens", KNOWN[name], "lm_head"):
        config = RandLoraConfig(r=4, target_modules=["proj"], modules_to_save=[saved])
        if head:
            model = get_peft_model(Model(), config)
            assert model.get_nb_trainable_parameters()[0] > 31 * 8
        else:
            with pytest.raises(ConfigError, match=f"'{KNOWN[name]}', 'lm_head' share"):
                get_peft_model(Model(), config)
