"""Weights that PEFT writes of its own accord are applied and kept, and do not train, as in PEFT."""

import json
import warnings

import jax
import numpy as np
import optax
import peft
import pytest
import torch
from families import twins
from flax import nnx
from peft_nets import CONFIG, PREFIX, WEIGHTS, rewrite
from peft_side import load, randomise
from safetensors.numpy import load_file

from randlora_jax import AdapterParam, RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

CASES = {
    "an adapted head": ({"target_modules": ["q_proj", "lm_head"]}, {}),
    "embeddings": ({"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
    "embeddings, and a module trained whole": (
        {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]},
        {"save_embedding_layers": True},
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return twins("llama", tmp_path_factory.mktemp("llama"))


def theirs(llama, folder):
    model = peft.PeftModel.from_pretrained(load("llama", llama.path), folder, is_trainable=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    given = {name: torch.tensor(x) for name, x in llama.inputs.items()}
    with torch.no_grad():
        return model.eval()(**given).logits.numpy(), trained


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_what_trains_is_what_trains_in_peft(llama, case, tmp_path, capsys):
    settings, saving = CASES[case]
    config = peft.RandLoraConfig(r=5, randlora_alpha=10, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load("llama", llama.path), config)
    randomise(model)
    for head in (model.get_input_embeddings(), model.get_output_embeddings()):
        head.weight.data += 0.1 * torch.randn_like(head.weight)  # as where tokens were added
    model.save_pretrained(tmp_path / "theirs", **saving)
    expected, count = theirs(llama, tmp_path / "theirs")
    carried = [
        key.removeprefix(PREFIX)
        for key in load_file(tmp_path / "theirs" / WEIGHTS)
        if key.endswith(".weight") and "o_proj" not in key
    ]
    assert carried
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "theirs"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["carried"] == sorted(carried)
    assert report["bytes"]["trained"] == 4 * count
    parts = ("trained", "carried", "bases", "header", "waste")
    assert sum(report["bytes"][part] for part in parts) == report["bytes"]["file"]

    ours = RandLoraModel.from_pretrained(llama.flax, tmp_path / "theirs", is_trainable=True)
    trained, frozen = ours.split()
    assert sum(x.size for x in jax.tree.leaves(trained)) == count
    assert ours.get_nb_trainable_parameters()[0] == count
    assert f", {count:,} numbers" in repr(ours)
    memory = ours.memory()
    assert (memory.gradients, memory.adamw) == (4 * count, 8 * count)
    found = ours(**llama.inputs, params={**frozen, "randlora": trained}).logits
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-5 * scale
    ours.save_pretrained(tmp_path / "ours")
    again, same = theirs(llama, tmp_path / "ours")
    assert same == count and np.abs(again - expected).max() <= 1e-5 * scale
    written, before = (
        json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs")
    )
    assert bool(written["modules_to_save"]) == bool(before["modules_to_save"])


class Net(nnx.Module):
    def __init__(self):
        self.up, self.down = (nnx.Linear(6, 6, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize("adapted", [["up"], ["up", "down"]])
def test_no_optimizer_of_an_nnx_model_has_it(adapted, tmp_path):
    names = {"(.*)": r"\1"}
    get_peft_model(Net(), RandLoraConfig(r=2, target_modules=adapted)).save_pretrained(
        tmp_path / "a", names=names
    )
    weight = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    key = PREFIX + ("down.base_layer.weight" if "down" in adapted else "down.weight")
    rewrite(tmp_path / "a", lambda tensors: {**tensors, key: weight})
    x = np.ones((2, 6), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = RandLoraModel.from_pretrained(Net(), tmp_path / "a", is_trainable=True)
        expected = np.asarray(Net().up(x)) @ weight.T
        np.testing.assert_allclose(np.asarray(model(x)), expected, rtol=1e-5, atol=1e-5)
        optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=AdapterParam)
        loss = nnx.grad(lambda m: (m(x) ** 2).sum(), argnums=nnx.DiffState(0, AdapterParam))
        optimizer.update(model, loss(model))
        model.set_adapter("default", inference_mode=True)
        model.set_adapter("default")
        model.save_pretrained(tmp_path / "b", names=names)
    trained = nnx.to_flat_state(nnx.state(model, AdapterParam))
    assert {path[-3] for path, _ in trained} == {"randlora_lambda", "randlora_gamma"}
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    np.testing.assert_array_equal(tensors[key], weight)
    assert (tensors[PREFIX + "up.randlora_lambda"] != 0).any()
    assert {a.path: a.taken for a in model.coverage()} == {
        "up/kernel": "adapted",
        "down/kernel": "adapted" if "down" in adapted else "left out",
    }
