"""The core runs where torch, transformers and peft are not installed."""

import subprocess
import sys

ALONE = r"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "accelerate"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
import tempfile
import jax.numpy as jnp
from flax import nnx
from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model
import randlora_jax.interop.peft_dir
class Net(nnx.Module):
    def __init__(self):
        self.lin = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    def __call__(self, x):
        return self.lin(x)
config = RandLoraConfig(r=2, target_modules=["lin"], init_weights=False)
model = get_peft_model(Net(), config, rngs=nnx.Rngs(1))
x = jnp.ones((3, 6))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    back = RandLoraModel.from_pretrained(Net(), folder)
assert (model(x) == back(x)).all() and not (model(x) == Net()(x)).all()
assert not {"torch", "transformers", "peft"} & set(sys.modules)
"""


def test_the_core_needs_no_torch_transformers_or_peft():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
