"""A small PyTorch model that PEFT adapts, saves and opens, and adapters made for it."""

import json
from pathlib import Path

import numpy as np
import peft
import torch
from randlora_jax.interop.adapter import Adapter, Provenance, bases_digest
from randlora_jax.interop.config import RandLoraConfig
from safetensors.numpy import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(5, 4)
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.dense(x))


class Net(torch.nn.Module):
    """Layers wide, tall and square, numbered so that the first by letters is not the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {2: (7, 10), 10: (10, 10), 11: (10, 5)}
        self.layer = torch.nn.ModuleDict({str(i): torch.nn.Linear(*s) for i, s in sizes.items()})
        self.head = Head()

    def forward(self, x):
        for layer in self.layer.values():
            x = layer(x).tanh()
        return self.head(x)


TARGETS = ["layer.2", "layer.10", "layer.11"]
NET_INPUT = torch.linspace(-1, 1, 21).reshape(3, 7)


def randomize(model: torch.nn.Module) -> None:
    """Give all that trains some value of its own, as training would."""
    torch.manual_seed(1)
    for x in model.parameters():
        if x.requires_grad:
            x.data = 0.1 * torch.randn_like(x)


def peft_settings(**config) -> peft.RandLoraConfig:
    return peft.RandLoraConfig(r=3, target_modules=TARGETS, randlora_alpha=3, **config)


def peft_net(directory: Path, **config) -> torch.Tensor:
    """Let PEFT save a trained adapter of `Net`; its output."""
    model = peft.get_peft_model(Net(), peft_settings(**config)).eval()
    randomize(model)
    model.save_pretrained(directory)
    output = run(model)
    assert (output - run(Net())).abs().max() > 1e-2, "the adapter changes nothing"
    return output


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(NET_INPUT)


def rewrite(directory: Path, change) -> None:
    """Replace a directory's tensors by `change(tensors)`."""
    tensors = change(load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def change_config(directory: Path, **changes) -> None:
    """Put other fields into a directory's configuration."""
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(values | changes))


def without(*words: str):
    """For `rewrite`: the tensors less those with one of `words` in their names."""
    return lambda tensors: {k: x for k, x in tensors.items() if not any(w in k for w in words)}


def is_base(key: str) -> bool:
    return key.endswith(("randlora_A", "randlora_B"))


def keep_bases(tensors: dict, wanted) -> dict:
    return {key: x for key, x in tensors.items() if not is_base(key) or wanted(key)}


def cast(tensors: dict, dtype) -> dict:
    small = ("randlora_lambda", "randlora_gamma")
    return {key: x.astype(dtype) if key.endswith(small) else x for key, x in tensors.items()}


def with_adapter_names(tensors: dict) -> dict:
    return {f"{key}.default" if "randlora_" in key else key: x for key, x in tensors.items()}


def jax_adapter(rng: np.random.Generator) -> Adapter:
    """An adapter of `Net` with bases of its own."""
    shapes = {
        f"layer.{i}": (layer.out_features, layer.in_features) for i, layer in Net().layer.items()
    }
    r, big, small = 3, 10, 10
    a = rng.normal(size=(r, 1, small)).astype(np.float32)
    b = rng.normal(size=(big, 4, r)).astype(np.float32)
    layers = {}
    for name, shape in shapes.items():
        n = -(-min(shape) // r)
        layers[name] = (
            rng.normal(size=(r, n)).astype(np.float32),
            rng.normal(size=(n, min(shape))).astype(np.float32),
        )
    return Adapter(
        config=RandLoraConfig(r=r, target_modules=TARGETS, projection_prng_key=42),
        layers=layers,
        bases=(a, b),
        provenance=Provenance("jax", 42, "dense", bases_digest(a, b), shapes),
    )
