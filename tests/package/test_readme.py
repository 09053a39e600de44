"""README.md's usages run, with what they say is the reader's own put before them."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from named_models import SMALL_QWEN3
from usages import USAGES, fences

from randlora_jax import AdapterParam, RandLoraConfig, get_peft_model

README = Path(__file__).parents[2] / "README.md"
TUNIX, OPENED, NNX, LINEN, HUGGING_FACE = fences(README)


def grown(model) -> float:
    """The largest lambda, which is zero before training."""
    flat = nnx.to_flat_state(nnx.state(model, AdapterParam))
    return max(float(abs(leaf[...]).max()) for path, leaf in flat if "randlora_lambda" in path)


@pytest.mark.torch
@pytest.mark.usefixtures("my_qwen3")
def test_the_language_model(tmp_path, monkeypatch):
    pytest.importorskip("tunix", reason="google-tunix is not here", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    guide = USAGES["tunix"]  # which has `inputs` and `batches`
    yours = guide[guide.index("def inputs") : guide.index("trainer = ")]
    imports = guide[: guide.index("base = ")]
    scope = {}
    exec(SMALL_QWEN3 + imports + yours + TUNIX, scope)
    assert grown(scope["model"]) > 0
    from transformers import Qwen3ForCausalLM

    exec(OPENED, scope := {"my_qwen3": Qwen3ForCausalLM.from_pretrained("my-qwen3")})
    moved = [p for name, p in scope["tuned"].named_parameters() if "randlora_lambda" in name]
    assert len(moved) == 14 and all(p.abs().max() > 0 for p in moved)


def test_the_frameworks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = jnp.ones((2, 8))
    net = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
    scope = {"net": net, "loss": lambda model: (model(x) ** 2).mean()}
    exec(NNX, scope)
    assert grown(scope["model"]) > 0
    scope["model"].save_pretrained("nnx")

    module = nn.Sequential([nn.Dense(8), nn.Dense(2)])
    scope |= {"module": module, "variables": module.init(jax.random.key(0), x), "x": x}
    exec(LINEN, scope)
    np.testing.assert_array_equal(scope["y"], module.apply(scope["variables"], x))
    scope["model"].save_pretrained("linen")
    for name in ("nnx", "linen"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()


@pytest.mark.torch
@pytest.mark.usefixtures("my_bert")
def test_hugging_face(tmp_path, monkeypatch):
    from transformers import BertTokenizer, FlaxBertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    inputs = dict(BertTokenizer.from_pretrained("my-bert")(["a good day"], return_tensors="np"))
    scope = {
        "FlaxBertForSequenceClassification": FlaxBertForSequenceClassification,
        "get_peft_model": get_peft_model,
        "config": RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear"),
        "inputs": inputs,
    }
    exec(HUGGING_FACE, scope)
    assert scope["logits"].shape == (1, 2)
