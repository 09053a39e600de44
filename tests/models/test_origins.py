"""Bases of every origin, through real files: PyTorch's own, JAX's, and ones only a file has."""

import jax
import numpy as np
import peft
import pytest
import torch
from families import FAMILIES, twins
from safetensors.numpy import load_file, save_file

from randlora_jax import (
    AdapterFileError,
    ConfigError,
    RandLoraConfig,
    RandLoraModel,
    get_peft_model,
)

pytestmark = pytest.mark.torch

KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return twins("opt", tmp_path_factory.mktemp("opt"))


def settings(kind, **kwargs):
    targets = FAMILIES["opt"][2]
    return {
        "r": 8,
        "randlora_alpha": 16,
        "target_modules": targets,
        "projection_prng_key": 5,
        **KINDS[kind],
        **kwargs,
    }


def torch_base(pair):
    return type(pair.torch).from_pretrained(pair.path, attn_implementation="eager").eval()


def peft_adapter(pair, folder, kind, **kwargs):
    model = peft.get_peft_model(torch_base(pair), peft.RandLoraConfig(**settings(kind, **kwargs)))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "randlora_lambda" in name:
                p.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model.eval()


def randomised(model):
    noise = np.random.default_rng(0)
    move = lambda x: x + noise.normal(0, 0.3, x.shape).astype("f")  # noqa: E731
    model.params = {**model.params, "randlora": jax.tree.map(move, model.params["randlora"])}
    return model


def same(found, expected):
    """But for roundings, of which some processors make more."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_bases_is_drawn_as_torch_does(pair, kind, tmp_path):
    theirs = peft_adapter(pair, tmp_path, kind, save_projection=False)
    if kind == "dense":
        with pytest.warns(UserWarning, match="assuming bf16-24bit"):
            ours = RandLoraModel.from_pretrained(pair.flax, tmp_path)
        other = RandLoraModel.from_pretrained(pair.flax, tmp_path, torch_generation="bf16-8bit")
        difference = np.abs(pair.flax_logits(other) - pair.torch_logits(theirs)).max()
        assert difference > 1e-3 * np.abs(pair.torch_logits(theirs)).max()
    else:
        ours = RandLoraModel.from_pretrained(pair.flax, tmp_path)
    same(pair.flax_logits(ours), pair.torch_logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_bases_are_recognised_and_keep_their_key(pair, kind, tmp_path):
    theirs = peft_adapter(pair, tmp_path / "theirs", kind)
    ours = RandLoraModel.from_pretrained(pair.flax, tmp_path / "theirs")
    config = ours.peft_config["default"]
    assert config.projection_source == ("torch:bf16-24bit" if kind == "dense" else "torch")
    ours.save_pretrained(tmp_path / "ours")
    assert RandLoraConfig.from_pretrained(tmp_path / "ours").projection_prng_key == 5
    back = peft.PeftModel.from_pretrained(torch_base(pair), tmp_path / "ours")
    np.testing.assert_array_equal(pair.torch_logits(back), pair.torch_logits(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_torchs_bases_gives_tiny_files_that_peft_opens(pair, kind, tmp_path):
    source = "torch:bf16-24bit" if kind == "dense" else "torch"
    config = RandLoraConfig(**settings(kind), save_projection=False, projection_source=source)
    ours = randomised(get_peft_model(pair.flax, config))
    expected = pair.flax_logits(ours)
    ours.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in kept if key.endswith(("randlora_A", "randlora_B"))]
    same(pair.torch_logits(peft.PeftModel.from_pretrained(torch_base(pair), tmp_path)), expected)
    # ours records how they were drawn: no warning, the same to the bit
    again = RandLoraModel.from_pretrained(pair.flax, tmp_path)
    np.testing.assert_array_equal(pair.flax_logits(again), expected)
    if kind == "dense":
        with pytest.raises(AdapterFileError, match="not those it was trained on"):
            RandLoraModel.from_pretrained(pair.flax, tmp_path, torch_generation="bf16-8bit")


def test_bases_that_nobody_draws_are_kept_whole(pair, tmp_path):
    peft_adapter(pair, tmp_path / "theirs", "dense")
    file = tmp_path / "theirs/adapter_model.safetensors"
    tensors = load_file(file)
    noise = np.random.default_rng(0)
    other = {
        k: noise.normal(size=v.shape).astype("f")
        for k, v in tensors.items()
        if "_A" in k or "_B" in k
    }
    first = {k[-10:]: v for k, v in other.items()}
    save_file({k: first.get(k[-10:], v) for k, v in tensors.items()}, file)
    theirs = peft.PeftModel.from_pretrained(torch_base(pair), tmp_path / "theirs")
    ours = RandLoraModel.from_pretrained(pair.flax, tmp_path / "theirs")
    assert ours.peft_config["default"].projection_source == "file"
    same(pair.flax_logits(ours), pair.torch_logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    # another key: PEFT would take an equal one for equal bases
    assert RandLoraConfig.from_pretrained(tmp_path / "ours").projection_prng_key != 5
    back = peft.PeftModel.from_pretrained(torch_base(pair), tmp_path / "ours")
    np.testing.assert_array_equal(pair.torch_logits(back), pair.torch_logits(theirs))


def test_peft_refuses_to_mix_ours_with_a_native_adapter(pair, tmp_path):
    peft_adapter(pair, tmp_path / "native", "dense")
    get_peft_model(pair.flax, RandLoraConfig(**settings("dense"))).save_pretrained(
        tmp_path / "ours"
    )
    model = peft.PeftModel.from_pretrained(torch_base(pair), tmp_path / "native")
    with pytest.raises(ValueError, match="PRNG"):
        model.load_adapter(tmp_path / "ours", "second")


def test_an_unnamed_draw_is_refused(pair):
    with pytest.raises(ConfigError, match=r"torch 2\.12 and later"):
        get_peft_model(pair.flax, RandLoraConfig(**settings("dense"), projection_source="torch"))
    with pytest.raises(ConfigError, match="describes an adapter that was loaded"):
        get_peft_model(pair.flax, RandLoraConfig(**settings("dense"), projection_source="file"))
    with pytest.raises(ConfigError, match="projection_source"):
        RandLoraConfig(projection_source="torch:2.13")
    with pytest.raises(ConfigError, match="Keep save_projection=True"):
        RandLoraConfig(save_projection=False)


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
def test_sparse_bases_of_a_base_model_in_another_dtype(pair, kind, tmp_path):
    base = torch_base(pair).bfloat16()
    theirs = peft.get_peft_model(
        base, peft.RandLoraConfig(**settings(kind, save_projection=False, init_weights=False))
    )
    theirs.save_pretrained(tmp_path / "theirs")
    expected = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in theirs.named_modules()
        if hasattr(module, "randlora_lambda")
    }

    def furthest(folder, **told):
        model = RandLoraModel.from_pretrained(pair.flax, folder, **told)
        found = model.delta_weights()
        assert found.keys() == expected.keys()
        return model, max(np.abs(found[k] - x).max() / np.abs(x).max() for k, x in expected.items())

    with pytest.warns(UserWarning, match=r"assuming float32.* base_dtype= or"):
        assert furthest(tmp_path / "theirs")[1] > 2e-5
    model, distance = furthest(tmp_path / "theirs", base_dtype="bfloat16")
    assert distance <= 1e-6
    model.save_pretrained(tmp_path / "ours")  # with a record of the dtype
    assert furthest(tmp_path / "ours")[1] <= 1e-6
    with pytest.raises(AdapterFileError, match="not those it was trained on"):
        furthest(tmp_path / "ours", base_dtype="float32")
    with pytest.raises(ConfigError, match="base_dtype 'fp16'"):
        furthest(tmp_path / "theirs", base_dtype="fp16")
    peft_adapter(pair, tmp_path / "whole", kind)
    with pytest.raises(ConfigError, match="holds its bases"):
        furthest(tmp_path / "whole", base_dtype="float32")
