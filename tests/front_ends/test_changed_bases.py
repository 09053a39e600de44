"""Bases that something has changed are said, wherever their key's would be taken for them."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from randlora_jax import AdapterParam, ConfigError, RandLoraConfig, get_peft_model

X = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
USES = {
    "saved": lambda model, folder: model.save_pretrained(folder, names={".*": r"\g<0>"}),
    "merged": lambda model, folder: model.merge_adapter(),
    "asked for": lambda model, folder: model.delta_weights(),
}


def trained(wrt):
    """A model of one layer after a step of AdamW, whose decay takes whatever it is given."""
    base = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    config = RandLoraConfig(r=4, target_modules="all-linear", init_weights=False)
    model = get_peft_model(base, config, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5), wrt=wrt)
    loss = nnx.grad(lambda model: (model(X) ** 2).mean(), argnums=nnx.DiffState(0, wrt))
    optimizer.update(model, loss(model))
    return model


@pytest.mark.filterwarnings("ignore:You differentiate the whole base model")
@pytest.mark.parametrize("use", USES)
def test_an_optimizer_for_all_params_changes_them_and_that_is_said(use, tmp_path):
    model = trained(nnx.Param)
    with pytest.raises(ConfigError, match=r"'jax-.*' of this model were changed"):
        USES[use](model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.draw_bases()
    USES[use](model, tmp_path / "adapter")


@pytest.mark.parametrize("use", USES)
def test_one_for_the_adapter_does_not(use, tmp_path):
    model = trained(AdapterParam)
    bases = jax.tree.leaves(model.randlora_bases)
    USES[use](model, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, bases, jax.tree.leaves(model.randlora_bases))
