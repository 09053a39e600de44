"""Row by row against PyTorch PEFT, which has each adapter alone: it ignores adapter_names here.

Adapters are made and run by PEFT, opened here side by side, and each row of one call must be what
PEFT gives with that row's adapter.
"""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from mlp import X, nnx_net, torch_net, torch_run
from tunix_pair import MODELS, TARGETS, jax_logits, load_torch, torch_logits

from randlora_jax import RandLoraModel

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


def of_tunix(name, folder):
    """A Hugging Face model in PyTorch and tunix's: how each is made, and its logits."""
    kind, config, load = MODELS[name](folder)
    torch.manual_seed(0)
    twin = kind(config)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p) * (p.std() if p.ndim > 1 else 1))
    twin.save_pretrained(folder)
    return lambda: load_torch(kind, folder), torch_logits, load, nnx.jit(jax_logits)


def of_mlp(folder):
    """Layers in nnx and in PyTorch."""
    run = nnx.jit(lambda model: model(jnp.asarray(X)))
    return torch_net, torch_run, lambda: nnx_net(torch_net()), run


LLM = {"r": 5, "randlora_alpha": 20, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
MLP = {"r": 5, "randlora_alpha": 10, "target_modules": ["tall", "square", "wide"]}
ATTENTION = {"r": 4, "randlora_alpha": 24, "target_modules": TARGETS[:4]}
PAIRS = {  # the models, and the adapters a, b and c
    "llama": (
        lambda folder: of_tunix("llama3", folder),
        [LLM, LLM | ATTENTION, LLM | {"randlora_alpha": 15, "modules_to_save": ["lm_head"]}],
    ),
    "qwen3": (
        lambda folder: of_tunix("qwen3", folder),
        [LLM, LLM | ATTENTION, LLM | {"randlora_alpha": 15, "modules_to_save": ["model.norm"]}],
    ),
    "mlp with biases": (
        of_mlp,
        [
            MLP | {"bias": "randlora_only"},
            MLP | {"r": 3, "randlora_alpha": 12, "target_modules": ["square"]},
            MLP | {"randlora_alpha": 15, "modules_to_save": ["head"]},
        ],
    ),
}


def made_by_peft(twin, settings, seed):
    """An adapter in PEFT, with numbers as if it had been trained."""
    model = peft.get_peft_model(twin, peft.RandLoraConfig(**settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_((0.3 if "lambda" in name else 0.3 * p.std()) * torch.randn_like(p))
    return model


@pytest.mark.parametrize("pair", PAIRS)
def test_each_row_is_what_peft_gives_with_its_adapter(pair, tmp_path):
    make, settings = PAIRS[pair]
    fresh, run_theirs, load, run = make(tmp_path / "base")
    base = run_theirs(fresh().eval())
    each = {"__base__": base}
    for seed, (name, config) in enumerate(zip("abc", settings, strict=True)):
        theirs = made_by_peft(fresh(), config, seed)
        each[name] = run_theirs(theirs)
        theirs.save_pretrained(tmp_path / name)
        assert np.std(each[name] - base) >= 0.1 * np.std(base), "it hardly moves the logits"
    model = RandLoraModel.from_pretrained(load(), tmp_path / "a", "a")
    for name in "bc":
        model.load_adapter(tmp_path / name, name)
    model.stack_adapters(2)

    def off(names):
        """How far a row is from PEFT's, at most, as a share of the largest logit."""
        model.set_rows(names)
        expected = np.stack([each[name][i] for i, name in enumerate(names)])
        return float(np.abs(np.asarray(run(model)) - expected).max() / np.abs(expected).max())

    rows = len(base)
    names = [*"abc", "__base__", *"ca"][:rows]
    for i in range(4):
        assert off([["a", "b", "c", "__base__"][(i + row) % 4] for row in range(rows)]) <= 1e-5
    model.set_rows([*names[1:], names[0]])  # a row too far
    expected = np.stack([each[name][i] for i, name in enumerate(names)])
    assert np.abs(np.asarray(run(model)) - expected).max() > 1e-2 * np.abs(expected).max()
    scaling = {n: c["randlora_alpha"] / c["r"] for n, c in zip("abc", settings, strict=True)}
    model.set_scale("b", scaling["c"] / scaling["b"])  # another adapter's
    assert off(names) > 1e-3
    model.set_scale("b", 1.0)
    assert off(names) <= 1e-5
