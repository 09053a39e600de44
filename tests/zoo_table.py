"""An adapter there and back for every family of the zoo, as a table in Markdown.

    python tests/zoo_table.py        what docs/models.md shows

Every linear layer of a family is adapted. "Ours in PEFT": random numbers in our adapter, saved and
opened by PEFT on the PyTorch class; "PEFT's here": the other way round. Both are the largest
difference of the outputs as a share of the largest output. The numbers are small enough that the
adapter moves the outputs by about their own size: more makes small random models chaotic, and
every rounding grows.
"""

import copy
import os
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from zoo import FAMILIES, Twins, mend_clip, twins

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model

NOISE = 0.1

REMARKS = {
    "albert": "one layer called many times",
    "bloom": "query, key and value in one matrix on both sides",
    "gemma": "right for rope_theta 1e4 without scaling",
    "gpt2": "Conv1D",
    "llama": "right for rope_theta 1e4 without scaling or MLP biases, and a head that is not tied; "
    "for others use [nnx models](trainers.md#fine-tuning)",
    "longt5": "needs `jnp.clip(a_max=)`, which new JAX has not; local attention",
    "marian": "right where both sides share their embeddings",
    "mistral": "as llama; sliding_window must be set",
    "mt5": "needs `jnp.clip(a_max=)`, which new JAX has not",
    "regnet": "convolutional: only the head is linear",
    "resnet": "convolutional: only the head is linear; right without downsample_in_bottleneck",
    "t5": "needs `jnp.clip(a_max=)`, which new JAX has not",
    "wav2vec2": "stable layer norm; right without adapter_attn_dim; "
    "PEFT itself cannot save it with an adapted lm_head",
}


@dataclass(frozen=True)
class Found:
    """What was found of one family; differences as shares of the largest output."""

    layers: int
    unadapted: float
    ours_in_peft: float
    theirs_here: float
    deltas: float  # largest relative difference of any layer's delta_W
    moved: float  # by the adapter that moves the outputs less, in standard deviations

    @property
    def allowed(self) -> float:
        return max(1e-5, 2 * self.unadapted)


def measure(pair: Twins, folder: Path) -> Found:
    """Take an adapter from ours to PEFT, and one from PEFT to ours."""
    chosen = settings(pair)
    base = pair.torch_output(pair.torch)

    ours = get_peft_model(pair.flax, RandLoraConfig(**chosen))
    rng = np.random.default_rng(1)
    move = lambda x: x + jnp.asarray(rng.normal(0, NOISE, x.shape), x.dtype)  # noqa: E731
    ours.params = {**ours.params, "randlora": jax.tree.map(move, ours.params["randlora"])}
    expected = pair.flax_output(ours)
    ours.save_pretrained(folder / "ours")
    opened = peft.PeftModel.from_pretrained(fresh(pair), folder / "ours").eval()
    ours_in_peft = share(pair.torch_output(opened), expected)

    theirs = by_peft(pair, folder / "theirs", seed=1)
    loaded = RandLoraModel.from_pretrained(pair.flax, folder / "theirs")
    found = pair.torch_output(theirs)
    theirs_here = share(pair.flax_output(loaded), found)
    return Found(
        len(chosen["target_modules"]),
        share(pair.flax_output(pair.flax), base),
        ours_in_peft,
        theirs_here,
        max(difference(ours, opened), difference(loaded, theirs)),
        float(min(np.std(expected - base), np.std(found - base)) / np.std(base)),
    )


def settings(pair: Twins) -> dict:
    """Every linear layer that both sides can adapt."""
    names = sorted(set(pair.torch_layers()) - {*pair.family.tied, *pair.family.left_out})
    return {"r": 5, "randlora_alpha": 10, "target_modules": names, "projection_prng_key": 3}


def by_peft(pair: Twins, folder: Path, seed: int) -> peft.PeftModel:
    """PEFT's model with an adapter of random numbers, saved in `folder`."""
    theirs = peft.get_peft_model(fresh(pair), peft.RandLoraConfig(**settings(pair))).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(NOISE * torch.randn_like(p))
    theirs.save_pretrained(folder)
    return theirs


def in_bfloat16(pair: Twins, folder: Path, numbers: int = 150) -> float:
    """How far we are from the float32 outputs, as a share of how far PEFT is (root mean squares).

    Both are chance for a few numbers, so there are as many adapters as give enough: four at least.
    """
    flax, torch_model = pair.in_bfloat16()
    ours, theirs = 0.0, 0.0
    size = pair.torch_output(pair.torch).size
    for seed in range(max(4, numbers // size)):
        exact = pair.torch_output(by_peft(pair, folder / str(seed), seed))
        loaded = RandLoraModel.from_pretrained(flax, folder / str(seed))
        opened = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), folder / str(seed))
        ours += ((pair.flax_output(loaded) - exact) ** 2).mean()
        theirs += ((pair.torch_output(opened) - exact) ** 2).mean()
    return float(np.sqrt(ours / theirs))


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def fresh(pair: Twins):
    return type(pair.torch).from_pretrained(pair.path, attn_implementation="eager").eval()


def difference(ours: RandLoraModel, theirs) -> float:
    """Of delta_W, the largest in any layer relative to its largest entry."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "randlora_lambda")
    }
    deltas = ours.delta_weights()
    assert set(deltas) == set(layers)
    worst = 0.0
    for name, found in deltas.items():
        expected = layers[name].get_delta_weight("default").detach().numpy()
        expected = expected.T if layers[name].fan_in_fan_out else expected
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def main() -> None:
    mend_clip()
    print(
        "| family | class | kind | layers | unadapted | ours in PEFT | PEFT's here | delta_W "
        "| bfloat16 | |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for name, family in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pair = twins(name, folder)
            found = measure(pair, Path(folder))
            low = in_bfloat16(pair, Path(folder))
        tied = f"tied {', '.join(family.tied)}" if family.tied else ""
        remark = "; ".join(filter(None, (REMARKS.get(name), tied)))
        print(
            f"| {name} | {family.torch_class} | {family.kind} | {found.layers} "
            f"| {found.unadapted:.1e} | {found.ours_in_peft:.1e} | {found.theirs_here:.1e} "
            f"| {found.deltas:.1e} | {low:.2f} | {remark} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
