"""Where PEFT is silently wrong: its result, asked of the installed PEFT, and ours.

docs/peft-differences.md lists these cases.
"""

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from families import twins
from flax import nnx
from peft_mlp import NnxMLP, TorchMLP, X, torch_mlp
from peft_mlp import run as our_run
from safetensors.torch import save_file
from torch_files import load_file

from randlora_jax import AdapterFileError, RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

WEIGHTS = "adapter_model.safetensors"


def settings(**more):
    return {"target_modules": ["lin1", "lin2"], "r": 4, "randlora_alpha": 8, **more}


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "randlora_lambda" in name or "randlora_gamma" in name:
                p.add_(0.5 * torch.randn_like(p))
    return model.eval()


def run(model, x=X):
    with torch.no_grad():
        return model.eval()(torch.tensor(x)).numpy()


def peft_file(folder, seed=0, **more):
    """A PEFT adapter on disk and what its model computes."""
    model = randomised(
        peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings(**more))), seed
    )
    model.save_pretrained(folder)
    return run(model)


def apart(one, other):
    return float(np.abs(one - other).max()) > 1e-3


def test_a_second_file_overwrites_the_firsts_bases(tmp_path):
    first = peft_file(tmp_path / "a")
    peft_file(tmp_path / "b", seed=1)
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    changed = {k: v * 2 if k.endswith("randlora_B") else v for k, v in tensors.items()}
    save_file(changed, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(torch_mlp(), tmp_path / "a")
    np.testing.assert_allclose(run(theirs), first, atol=1e-5)
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.set_adapter("default")
    assert apart(run(theirs), first), "PEFT keeps the first's bases now"

    ours = RandLoraModel.from_pretrained(NnxMLP(), tmp_path / "a")
    before = our_run(ours)
    ours.load_adapter(tmp_path / "b", "b")
    np.testing.assert_array_equal(our_run(ours), before)


def test_a_second_adapters_kind_is_ignored():
    theirs = peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings()))
    theirs.add_adapter("b", peft.RandLoraConfig(**settings(sparse=True)))
    a, b = (theirs.base_model.model.lin1.randlora_B[name] for name in ("default", "b"))
    assert a is b, "PEFT draws sparse bases for the second now"

    ours = get_peft_model(NnxMLP(), RandLoraConfig(**settings()))
    ours.add_adapter("b", RandLoraConfig(**settings(sparse=True)))
    assert len(ours.randlora_bases) == 2


def test_a_second_file_without_bases_gets_the_firsts(tmp_path):
    peft_file(tmp_path / "wide", target_modules=["lin0", "lin1", "lin3"], save_projection=False)
    narrow = peft_file(tmp_path / "narrow", seed=1, target_modules=["lin0"], save_projection=False)
    theirs = peft.PeftModel.from_pretrained(torch_mlp(), tmp_path / "wide")
    theirs.load_adapter(tmp_path / "narrow", "narrow")
    theirs.set_adapter("narrow")
    assert apart(run(theirs), narrow), "PEFT draws the narrower bases now"

    base = torch_mlp_in_nnx()
    draw = {"torch_generation": "bf16-24bit"}
    ours = RandLoraModel.from_pretrained(base, tmp_path / "wide", **draw)
    ours.load_adapter(tmp_path / "narrow", "narrow", **draw)
    ours.set_adapter("narrow")
    np.testing.assert_allclose(our_run(ours), narrow, atol=1e-4)


def torch_mlp_in_nnx():
    """An nnx model with the weights of `torch_mlp()`."""
    net, twin = NnxMLP(), torch_mlp()
    for name in ("lin0", "lin1", "lin2", "lin3"):
        layer = getattr(twin, name)
        getattr(net, name).kernel[...] = jnp.asarray(layer.weight.detach().numpy().T)
        getattr(net, name).bias[...] = jnp.asarray(layer.bias.detach().numpy())
    return net


def test_bases_are_ignored_where_the_config_says_so(tmp_path):
    peft_file(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    changed = {k: v * 2 if k.endswith("randlora_B") else v for k, v in tensors.items()}
    save_file(changed, tmp_path / WEIGHTS, {"format": "pt"})
    doubled = run(peft.PeftModel.from_pretrained(torch_mlp(), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"save_projection": False}))
    ignored = run(peft.PeftModel.from_pretrained(torch_mlp(), tmp_path))
    assert apart(ignored, doubled), "PEFT uses the file's bases now"

    with pytest.raises(AdapterFileError, match=r"expected no bases.*save_projection"):
        RandLoraModel.from_pretrained(torch_mlp_in_nnx(), tmp_path)


def test_rows_of_a_batch_all_run_the_active_adapter(tmp_path):
    theirs = peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings()))
    theirs.add_adapter("b", peft.RandLoraConfig(**settings()))
    randomised(theirs)
    rows = ["default", "b", "default", "b", "b"]
    with torch.no_grad():
        mixed = theirs(torch.tensor(X), adapter_names=rows).numpy()
    np.testing.assert_array_equal(mixed, run(theirs))

    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(torch_mlp_in_nnx(), tmp_path)
    ours.load_adapter(tmp_path / "b", "b")
    each = {"default": run(theirs)}
    theirs.set_adapter("b")
    each["b"] = run(theirs)
    assert apart(each["b"], each["default"])
    expected = np.stack([each[name][i] for i, name in enumerate(rows)])
    found = ours(jnp.asarray(X), adapter_names=rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_unmerging_keeps_the_rounding():
    base = torch_mlp().bfloat16()
    before = base.lin1.weight.detach().clone()
    theirs = randomised(peft.get_peft_model(base, peft.RandLoraConfig(**settings())))
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model.lin1.base_layer.weight, before)

    ours = get_peft_model(
        NnxMLP(jnp.bfloat16), RandLoraConfig(**settings(init_weights=False)), rngs=nnx.Rngs(0)
    )
    kernel = np.asarray(ours.model.lin1.kernel[...])
    ours.merge_adapter()
    assert (np.asarray(ours.model.lin1.kernel[...]) != kernel).any()
    ours.unmerge_adapter()
    np.testing.assert_array_equal(np.asarray(ours.model.lin1.kernel[...]), kernel)


def test_merging_another_leaves_the_active_one_out(tmp_path):
    theirs = peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings()))
    theirs.add_adapter("b", peft.RandLoraConfig(**settings()))
    randomised(theirs)
    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(torch_mlp_in_nnx(), tmp_path)
    ours.load_adapter(tmp_path / "b", "b")
    theirs.base_model.set_adapter(["default", "b"])
    both = run(theirs)
    theirs.set_adapter("default")
    for model in (theirs, ours):
        model.merge_adapter(["b"])
    assert apart(run(theirs), both), "PEFT applies the active adapter beside merged ones now"
    np.testing.assert_allclose(our_run(ours), both, rtol=0, atol=1e-5 * np.abs(both).max())


def test_disabling_leaves_biases_trained():
    plain = run(torch_mlp())
    theirs = randomised(
        peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings(bias="all")))
    )
    with theirs.disable_adapter(), pytest.warns(UserWarning, match="bias"):
        theirs.base_model.disable_adapter_layers()
    with theirs.disable_adapter():
        assert apart(run(theirs), plain), "PEFT gives the base model's biases back now"

    ours = get_peft_model(torch_mlp_in_nnx(), RandLoraConfig(**settings(bias="all")))
    for layer in (ours.model.lin0, ours.model.lin1):
        for leaf in layer.trained_leaves["default"].values():
            leaf[...] = leaf[...] + 1
    assert apart(our_run(ours), plain)
    with ours.disable_adapter():
        np.testing.assert_allclose(our_run(ours), plain, atol=1e-5)


def test_switching_off_and_on_trains_what_was_frozen():
    theirs = peft.get_peft_model(torch_mlp(), peft.RandLoraConfig(**settings()))
    ours = get_peft_model(NnxMLP(), RandLoraConfig(**settings()))
    for model in (theirs, ours):
        model.set_adapter("default", inference_mode=True)
        assert model.get_nb_trainable_parameters()[0] == 0
        model.disable_adapter_layers()
        model.enable_adapter_layers()
    assert theirs.get_nb_trainable_parameters()[0], "PEFT leaves a frozen adapter frozen now"
    assert ours.get_nb_trainable_parameters()[0] == 0


def test_merging_into_a_tied_head_moves_the_embedding(tmp_path):
    model = twins("opt", tmp_path).torch
    embedding = model.get_input_embeddings().weight.detach().clone()
    config = peft.RandLoraConfig(**settings(target_modules=["lm_head"]))
    merged = randomised(peft.get_peft_model(model, config)).merge_and_unload()
    assert not torch.equal(merged.get_input_embeddings().weight, embedding)


def test_what_peft_cannot_open_together_is_said_when_saved(tmp_path):
    ours = get_peft_model(NnxMLP(), RandLoraConfig(**settings()))
    ours.add_adapter("b", RandLoraConfig(**settings(target_modules=["lin0"])))
    with pytest.warns(UserWarning, match="only one at a time.*'b'.*other bases"):
        ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(TorchMLP(), tmp_path)
    with pytest.raises(ValueError, match="PRNG initialisation key"):
        theirs.load_adapter(tmp_path / "b", "b")


def test_switching_under_jit():
    """What docs/peft-differences.md says of arguments and closures."""
    ours = get_peft_model(
        NnxMLP(), RandLoraConfig(**settings(init_weights=False)), rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(X)
    given, closed = nnx.jit(lambda model, x: model(x)), nnx.jit(lambda x: ours(x))
    adapted = np.asarray(given(ours, x))
    assert not apart(np.asarray(closed(x)), adapted)
    with ours.disable_adapter():
        assert apart(np.asarray(given(ours, x)), adapted)
        assert not apart(np.asarray(closed(x)), adapted)
    np.testing.assert_array_equal(np.asarray(given(ours, x)), adapted)
