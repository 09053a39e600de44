"""PyTorch's bases in a model whose adapted kernels have several dtypes."""

import jax.numpy as jnp
import peft
import pytest
import torch
from flax import nnx
from randlora_jax.interop.adapter import bases_digest
from randlora_jax.interop.peft_dir import read_adapter

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

pytestmark = pytest.mark.torch

SETTINGS = {"r": 5, "sparse": True, "target_modules": ["up", "down"]}


class Twin(torch.nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up = torch.nn.Linear(24, 28).to(getattr(torch, up))
        self.down = torch.nn.Linear(28, 24).to(getattr(torch, down))


class Net(nnx.Module):
    def __init__(self, up, down):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(24, 28, param_dtype=jnp.dtype(up), rngs=rngs)
        self.down = nnx.Linear(28, 24, param_dtype=jnp.dtype(down), rngs=rngs)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
    ],
    ids="-".join,
)
def test_the_coarsest_dtype_lasts_as_in_peft(dtypes, tmp_path):
    config = peft.RandLoraConfig(**SETTINGS, save_projection=False)
    wrapped = peft.get_peft_model(Twin(*dtypes), config)
    wrapped.save_pretrained(tmp_path / "theirs")
    expected = [getattr(wrapped.base_model, f"randlora_{x}")["default"].numpy() for x in "AB"]

    coarsest = "bfloat16" if "bfloat16" in dtypes else "float16"
    fresh = get_peft_model(Net(*dtypes), RandLoraConfig(**SETTINGS, projection_source="torch"))
    with pytest.warns(UserWarning, match=f"assuming {coarsest}, "):
        read = RandLoraModel.from_pretrained(Net(*dtypes), tmp_path / "theirs")
    for name, model in (("fresh", fresh), ("read", read)):
        model.save_pretrained(tmp_path / name, names={"(.*)": r"\1"})
        found = read_adapter(tmp_path / name).provenance
        assert found.digest == bases_digest(*expected)
