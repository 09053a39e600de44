"""One layer that PEFT adapted, and the same numbers for us."""

import jax.numpy as jnp
import peft
import torch

from randlora_jax.core.bases import BasisPair
from randlora_jax.core.update import Update


class One(torch.nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.lin = torch.nn.Linear(n_in, n_out, bias=False)

    def forward(self, x):
        return self.lin(x)


def peft_layer(n_in, n_out, r, seed=0, alpha=3.0):
    """A PEFT layer with random lambda and gamma, and the same numbers for us."""
    torch.manual_seed(seed)
    config = peft.RandLoraConfig(r=r, randlora_alpha=alpha, target_modules=["lin"])
    layer = peft.get_peft_model(One(n_in, n_out), config).base_model.model.lin
    with torch.no_grad():
        layer.randlora_lambda["default"].normal_()
        layer.randlora_gamma["default"].normal_()
    update = Update(
        jnp.asarray(layer.randlora_lambda["default"].detach().numpy()),
        jnp.asarray(layer.randlora_gamma["default"].detach().numpy()),
        BasisPair(
            jnp.asarray(layer.randlora_A["default"].float().numpy()[:, 0]),
            jnp.asarray(layer.randlora_B["default"].float().numpy()),
        ),
        alpha / r,
        (n_in, n_out),
    )
    return layer, update
