"""Other people's models beside their twins in PyTorch: an adapter of random numbers, taken there.

    python benchmarks/code_base_pairs.py --from FOLDER [NAME...]

FOLDER holds checkouts of the code bases, as for code_bases.py; NAME picks pairs, such as
``"bonsai, ViT"``. Both sides get the same small random weights: the twin's through the code base's
own loader where it has one, else ours by the names and layouts that the library knows. Prints the
largest difference of the outputs, as a share of the largest, without an adapter and with it.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
from code_bases import BASES, Wrapped, code_base
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict
from small_models import bonsai_pairs, language_pairs

from randlora_jax import RandLoraConfig, get_peft_model
from randlora_jax.models.peft_layout import to_peft_layout

SETTINGS = {"r": 3, "randlora_alpha": 6, "target_modules": "all-linear"}
PAIRS = {**bonsai_pairs.PAIRS, **language_pairs.PAIRS}


def base_arrays(model) -> dict[tuple, jax.Array]:
    """A base model's own parameters, by path."""
    if isinstance(model, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {path: leaf.get_raw_value() for path, leaf in flat}
    return flatten_dict(meta.unbox(model.unbind()[1]["params"]))


def torch_arrays(value, path, registry) -> dict[str, np.ndarray]:
    """Ours at `path` by PyTorch key."""
    if path[-1] == "scale" and value.ndim == 2:  # MaxText's scanned norms: (features, layers)
        names = registry.names.of(path[:-1], value.shape[1:])
        return {f"{name}.weight": x for name, x in zip(names, np.asarray(value).T, strict=True)}
    return to_peft_layout(value, path, registry.layer_of(path), registry.names)


def fill(twin, arrays, registry) -> None:
    """Puts our parameters into the twin, every one of its, under the names that are known."""
    state = {}
    for path, value in arrays.items():
        for key, array in torch_arrays(value, path, registry).items():
            state[key] = torch.tensor(array)
    differing = set(state) ^ {name for name, _ in twin.named_parameters()}
    if differing:
        raise ValueError(f"parameters of one side alone: {sorted(differing)}")
    twin.load_state_dict(state, strict=False)
    twin.tie_weights()


def shaken(trained):
    """Random lambda and gamma."""
    draws = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + 0.1 * draws.standard_normal(x.shape).astype(x.dtype), trained)


def far(ours, theirs) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def made(pair, folder) -> tuple[torch.nn.Module, Wrapped]:
    """The twin, and ours wrapped, with the same weights."""
    pair.config._attn_implementation = "eager"
    twin = getattr(transformers, pair.torch_class)(pair.config).eval()
    model = pair.entry.model
    if pair.load:
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.1 * torch.randn_like(p))
        twin.save_pretrained(folder)
        model = pair.load(folder)
    arrays = base_arrays(model)
    config, said = pair.entry.stated()
    config = RandLoraConfig(**{**SETTINGS, **config})
    wrapped = Wrapped(pair.entry, get_peft_model(model, config, **said))
    if not pair.load:
        fill(twin, arrays, wrapped.model._registry)
    return twin, wrapped


def compared(pair) -> tuple[float, float, float]:
    """How far ours is from the twin, alone and with an adapter saved here; how far that moves it.

    The last as a share of the outputs' standard deviation.
    """
    given = {name: np.asarray(x) for name, x in pair.entry.inputs.items()}
    inputs = {name: torch.tensor(np.asarray(x)) for name, x in pair.inputs(given).items()}
    inputs = {n: x if x.is_floating_point() else x.long() for n, x in inputs.items()}

    def logits(model):
        with torch.no_grad():
            return model(**inputs)[pair.output].numpy()

    with tempfile.TemporaryDirectory() as folder:
        twin, wrapped = made(pair, f"{folder}/base")
        before = wrapped.output()
        alone = far(before, logits(twin))
        wrapped.put(shaken(wrapped.trained()))
        after = wrapped.output()
        wrapped.model.save_pretrained(f"{folder}/adapter")
        opened = peft.PeftModel.from_pretrained(twin, f"{folder}/adapter").eval()
        return alone, far(after, logits(opened)), float((after - before).std() / before.std())


def main() -> None:
    """Compares each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, required=True)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    sys.path[:0] = [
        str(args.folder.resolve() / path) for key in BASES for path in code_base(key).paths
    ]
    print(
        "| model | class in PyTorch | unadapted | ours in PEFT | the adapter moves it by |\n"
        + "|---" * 5
        + "|"
    )
    for name in args.names or PAIRS:
        torch.manual_seed(0)
        pair = PAIRS[name]()
        alone, adapted, moves = compared(pair)
        cells = f"{alone:.1e} | {adapted:.1e} | {moves:.2g} std"
        print(f"| {name} | {pair.torch_class} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
