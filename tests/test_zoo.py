"""Every Flax family of transformers: its layers by PyTorch's names, an adapter there and back."""

import jax.numpy as jnp
import pytest
from zoo import FAMILIES, mend_clip, twins
from zoo_table import measure

from randlora_jax import RandLoraConfig, TargetError, get_peft_model
from randlora_jax.model import wrap


@pytest.fixture(params=sorted(FAMILIES))
def pair(request, tmp_path, monkeypatch):
    monkeypatch.setattr(jnp, "clip", jnp.clip)  # what `mend_clip` does ends with the test
    mend_clip()
    return twins(request.param, tmp_path / "base")


def test_family(pair, tmp_path):
    ours = wrap(pair.flax, "auto")._book.owners()
    theirs = pair.torch_layers()
    assert set(theirs) - set(ours) == set(pair.family.tied)
    assert {name: layer.matrix for name, layer in ours.items()} == {
        name: shape for name, shape in theirs.items() if name in ours
    }
    for name in pair.family.tied:
        with pytest.raises(TargetError, match=r"has no kernel of its own.*tied"):
            get_peft_model(pair.flax, RandLoraConfig(r=5, target_modules=[name]))
    found = measure(pair, tmp_path)
    print(found)
    assert found.moved >= 0.1, "the adapter hardly moves the outputs"
    assert found.ours_in_peft <= found.allowed and found.theirs_here <= found.allowed
    assert found.deltas <= 1e-6
