"""PEFT's merge of RandLoRA into 4- and 8-bit layers uses another formula than its float layers."""

from pathlib import Path

import peft
import pytest
import torch

pytestmark = pytest.mark.torch

SOURCE = Path(peft.__file__).parent / "tuners" / "randlora" / "bnb.py"


def adapted(n_in, n_out):
    """A float layer of PEFT's, with an adapter that does something; what bnb.py merges into it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
    model = peft.get_peft_model(net, peft.RandLoraConfig(r=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    update_b, update_a = layer.get_scaled_bases("default")
    update_b = update_b * layer.scaling["default"]
    return layer.get_delta_weight("default").detach(), update_b.detach(), update_a.detach()


def test_peft_still_has_the_formula():
    """When this fails, PEFT has changed it: see docs/peft-differences.md."""
    assert SOURCE.read_text().count("update = update_B @ update_A\n") == 2


def test_it_is_wrong_for_square_layers():
    delta, update_b, update_a = adapted(24, 24)
    merged = update_b @ update_a
    assert merged.shape == delta.shape
    assert (merged - delta).std() > 0.9 * delta.std()


@pytest.mark.parametrize(("n_in", "n_out"), [(24, 36), (36, 24)])
def test_it_cannot_be_multiplied_elsewhere(n_in, n_out):
    _, update_b, update_a = adapted(n_in, n_out)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        update_b @ update_a
