"""A wrapped nnx model whose Variables hold NumPy arrays, as a checkpoint leaves them."""

import jax
import numpy as np
import pytest
from flax import nnx
from many_nets import CONFIGS, IDS, Net, adapted

from randlora_jax import RandLoraModel


@pytest.mark.filterwarnings("ignore:.*are saved by their paths in the JAX model")
@pytest.mark.parametrize("in_stacks", [False, True])
def test_they_serve_as_jax_s(in_stacks, tmp_path):
    model = adapted(configs={"default": CONFIGS["a"]})
    right = model(IDS)
    if in_stacks:
        model.stack_adapters()
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, jax.tree.map(np.asarray, nnx.to_pure_dict(state)))
    nnx.update(model, state)

    def close(found):
        np.testing.assert_allclose(found, right, atol=1e-5)

    close(model(IDS))
    close(model(IDS, adapter_names=["default"] * 4))
    model.save_pretrained(tmp_path)
    close(RandLoraModel.from_pretrained(Net(nnx.Rngs(0)), tmp_path)(IDS))
    if not in_stacks:
        model.merge_adapter()
        close(model(IDS))
        model.unmerge_adapter()
    close(model.merge_and_unload()(IDS))
