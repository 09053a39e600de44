"""A base model of other sizes than the one that was trained on, as the file's tensors tell it."""

import pytest
import transformers
from families import FAMILIES
from peft_side import load, save_adapter, save_base
from randlora_jax.interop.errors import TargetError
from test_base_dtype import deltas, furthest, lora, run

from randlora_jax import RandLoraModel

pytestmark = pytest.mark.torch

ADVICE = "Resize the base model as it was for training"
DRAWN = ["--torch-generation", "bf16-24bit"]


def with_tokens(family, tokens):
    """Loads a model and gives it other tokens than its checkpoint has."""

    def make(base):
        model = load(family, base)
        model.resize_token_embeddings(tokens)
        return model

    return make


def refused(folder, capsys, *words):
    for command in ("to-lora", "convert", "inspect", "merge", "verify"):
        capsys.readouterr()
        assert run(command, folder, *DRAWN) == 1, command
        said = capsys.readouterr().err
        assert all(word in said for word in (ADVICE, *words))
        assert not (folder / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_of_other_tokens_is_refused(tied, tmp_path, capsys):
    save_base("llama", tmp_path / "base", tie_word_embeddings=tied)
    settings = {"target_modules": ["q_proj", "lm_head"], "save_projection": False}
    make = with_tokens("llama", 104)
    model = save_adapter("llama", tmp_path / "base", tmp_path / "adapter", auto=make, **settings)
    expected = deltas(model)
    refused(tmp_path, capsys, "'lm_head.weight'", "[97, 36]", "[104, 36]")
    if not tied:
        flax = transformers.FlaxLlamaForCausalLM.from_pretrained(tmp_path / "base", from_pt=True)
        with pytest.raises(TargetError, match=r"lm_head.*\(104, 36\)"):
            RandLoraModel.from_pretrained(flax, tmp_path / "adapter", torch_generation=DRAWN[1])
    model.unload().save_pretrained(tmp_path / "base")
    assert run("to-lora", tmp_path, *DRAWN) == 0
    assert furthest(lora(tmp_path), expected) <= 1e-5


def test_so_it_is_where_the_embedding_alone_tells(tmp_path, capsys):
    save_base("llama", tmp_path / "base", tie_word_embeddings=False)
    model = save_adapter(
        "llama",
        tmp_path / "base",
        tmp_path / "adapter",
        auto=with_tokens("llama", 104),
        target_modules=["q_proj", "lm_head"],
        modules_to_save=["embed_tokens"],
        save_projection=False,
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    refused(tmp_path, capsys, "'model.embed_tokens.weight'", "[97, 36]", "[104, 36]")


def test_tokens_that_no_adapted_layer_knows_of_change_no_basis(tmp_path, capsys):
    save_base("llama", tmp_path / "base", tie_word_embeddings=False)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = save_adapter(
        "llama",
        tmp_path / "base",
        tmp_path / "adapter",
        auto=with_tokens("llama", 104),
        save_projection=False,
        **settings,
    )
    assert run("to-lora", tmp_path, *DRAWN) == 0
    assert furthest(lora(tmp_path), deltas(model)) <= 1e-5
    (tmp_path / "out").rename(tmp_path / "lora")
    assert run("merge", tmp_path, *DRAWN) == 1
    assert ADVICE in capsys.readouterr().err


def test_biases_tell_the_side_that_gamma_does_not(tmp_path, capsys):
    save_base("bert", tmp_path / "base")
    settings = {"target_modules": ["intermediate.dense"], "save_projection": False}
    save_adapter("bert", tmp_path / "base", tmp_path / "adapter", bias="randlora_only", **settings)
    other = FAMILIES["bert"][1]()
    other.intermediate_size = 60
    transformers.BertForSequenceClassification(other).save_pretrained(tmp_path / "base")
    refused(tmp_path, capsys, "intermediate.dense.bias", "[60]", "[52]")
