"""Adapters by repository id, from a local cache laid out as huggingface_hub does."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from mlp import KINDS, torch_net
from randlora_jax.interop import hub

from randlora_jax import AdapterFileError, RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

make, run, randomise = KINDS["linen"]


def adapted(seed):
    config = RandLoraConfig(
        r=5, randlora_alpha=10, target_modules=["square"], base_model_name_or_path="me/base"
    )
    model = get_peft_model(make(torch_net()), config)
    randomise(model, np.random.default_rng(seed))
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of one repository: "main" and the tag "v1"."""
    repository = tmp_path / "hub/models--me--my-adapter"
    for seed, (ref, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        adapted(seed).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: _original(*args, cache_dir=str(tmp_path / "hub"), **kwargs),
    )


_original = huggingface_hub.snapshot_download


@pytest.mark.parametrize("seed, revision", [(0, None), (1, "v1"), (1, "b" * 40)])
def test_from_the_cache_offline(cache, seed, revision):
    back = RandLoraModel.from_pretrained(make(torch_net()), "me/my-adapter", revision=revision)
    np.testing.assert_array_equal(run(back), run(adapted(seed)))


def test_an_adapter_in_a_subfolder(cache, tmp_path):
    adapted(2).save_pretrained(tmp_path / "run" / "step" / "20")
    snapshot = tmp_path / "hub/models--me--my-adapter/snapshots" / ("a" * 40)
    adapted(2).save_pretrained(snapshot / "step/20")
    for source in (tmp_path / "run", "me/my-adapter"):
        back = RandLoraModel.from_pretrained(make(torch_net()), source, subfolder="step/20")
        np.testing.assert_array_equal(run(back), run(adapted(2)))
        back.load_adapter(source, "again", subfolder="step/20")
    for subfolder in ("../run", "/step", "", 3):
        with pytest.raises(AdapterFileError, match="subfolder: expected"):
            RandLoraModel.from_pretrained(make(torch_net()), source, subfolder=subfolder)
    with pytest.raises(AdapterFileError, match="no subfolder 'stop'; adapters are in '20'"):
        hub.local_directory(tmp_path / "run" / "step", subfolder="stop")


def test_what_is_not_there_is_said(cache, tmp_path):
    for source, revision, words in [
        ("me/other", None, "^no folder 'me/other' here .*, nor does the hub give a repository"),
        ("me/my-adapter", "v2", "revision v2"),
        ("./not/here", None, "expected a directory"),
        (tmp_path / "nothing", None, "expected a directory"),
        (tmp_path, "v1", "is a directory, which has none"),
    ]:
        with pytest.raises(AdapterFileError, match=words) as told:
            RandLoraModel.from_pretrained(make(torch_net()), source, revision=revision)
        assert told.value.__cause__ is None and told.value.__suppress_context__ == (
            "the hub" in str(told.value)
        )


def test_a_repository_of_a_pickle_is_told(cache, tmp_path):
    snapshot = tmp_path / "hub/models--me--my-adapter/snapshots" / ("a" * 40)
    (snapshot / "adapter_model.safetensors").unlink()
    told = r"adapter_model\.bin, is not fetched; .* hf download"
    with pytest.raises(AdapterFileError, match=told):
        hub.local_directory("me/my-adapter")


def test_push_uploads_one_whole_directory(monkeypatch):
    """Everything but the network: the hub's client is replaced by one that looks at the folder."""
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, exist_ok, private):
            seen["repo"] = (repo_id, exist_ok, private)

        def upload_folder(self, repo_id, folder_path, **options):
            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())
            seen["config"] = json.loads((Path(folder_path) / "adapter_config.json").read_text())
            seen["options"] = options
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = adapted(0)
    assert model.push_to_hub("me/x", private=True, token="t", commit_message="first") == "commit"
    assert seen["repo"] == ("me/x", True, True) and seen["token"] == "t"
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert seen["config"]["peft_type"] == "RANDLORA"
    assert seen["options"] == {"commit_message": "first"}


def test_the_model_card_is_valid_and_the_users_own_stays(tmp_path):
    model = adapted(0)
    model.save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / hub.CARD_NAME)
    assert card.data.base_model == "me/base" and card.data.library_name == "peft"
    assert "randlora" in card.data.tags
    assert f"{model.get_nb_trainable_parameters()[0]:,} trained numbers" in card.text
    (tmp_path / hub.CARD_NAME).write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / hub.CARD_NAME).read_text() == "mine"
