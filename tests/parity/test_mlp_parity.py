"""nnx and plain linen models against PEFT on a PyTorch twin, both ways, over awkward ranks."""

import numpy as np
import peft
import pytest
import torch
from mlp import KINDS, TARGETS, assert_same, torch_net, torch_run

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch


# 5 divides nothing, 12 is above one layer's min, 30 is above them all
@pytest.mark.parametrize("r", [1, 5, 12, 30])
@pytest.mark.parametrize("apply", ["factored", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_peft(kind, apply, r, tmp_path):
    make, run, _ = KINDS[kind]
    config = peft.RandLoraConfig(
        r=r, randlora_alpha=2 * r, target_modules=TARGETS, modules_to_save=["head"], bias="all"
    )
    theirs = peft.get_peft_model(torch_net(), config)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = RandLoraModel.from_pretrained(make(torch_net()), tmp_path, apply=apply)
    assert_same(run(ours), torch_run(theirs), torch_run(torch_net()))


@pytest.mark.parametrize("r", [1, 5, 12, 30])
@pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_peft(kind, bias, r, tmp_path):
    make, run, randomise = KINDS[kind]
    config = RandLoraConfig(
        r=r, randlora_alpha=2 * r, target_modules=TARGETS, modules_to_save=["head"], bias=bias
    )
    ours = get_peft_model(make(torch_net()), config)
    np.testing.assert_array_equal(run(ours), run(get_peft_model(make(torch_net()), config)))
    randomise(ours, np.random.default_rng(1))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_net(), tmp_path)
    assert_same(run(ours), torch_run(theirs), torch_run(torch_net()))
    again = RandLoraModel.from_pretrained(make(torch_net()), tmp_path, is_trainable=True)
    np.testing.assert_array_equal(run(again), run(ours))
    assert again.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    frozen = RandLoraModel.from_pretrained(make(torch_net()), tmp_path)
    assert frozen.get_nb_trainable_parameters()[0] == 0
