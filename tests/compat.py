"""Lets several PEFT releases open what we write, and opens what they write; compares logits.

    python tests/compat.py PYTHON...        each the python of an environment with another PEFT

`make compat` does so with the oldest PEFT that has RandLoRA, one between, and the pinned one.
Prints a table in Markdown, which docs/format.md shows; exits with 1 if a route fails.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from compat_reader import EAGER, NATIVE, NATIVE_KEY
from families import FAMILIES, WIDTHS, Twins, twins

from randlora_jax import RandLoraConfig, RandLoraModel, get_peft_model
from randlora_jax.commands.main import main as command

ADAPTERS = {
    "jax dense": {},
    "jax sparse": {"sparse": True},
    "jax very sparse": {"very_sparse": True},
    "torch dense": {"projection_source": "torch:bf16-24bit"},
    "torch, no bases": {"projection_source": "torch:bf16-24bit", "save_projection": False},
    "jax, biases": {"bias": "all"},
}

MIXED = "beside a native one"
IDS = np.random.default_rng(3).integers(3, 97, (4, 11))


@dataclass
class Model:
    """A model in both frameworks, and what ours computes with each of its adapters."""

    pair: Twins
    tolerance: float
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def opened(self, folder: Path) -> np.ndarray:
        """The logits here with an adapter of PEFT's."""
        return self.pair.flax_logits(RandLoraModel.from_pretrained(self.pair.flax, folder))


@dataclass
class Mixture:
    """A mixture of experts, which Flax has not: adapters are merged into its checkpoint.

    Some releases take a layer's number in a name for the expert's (`layers_to_transform`).
    """

    folder: Path
    tolerance: float = 0.0

    @classmethod
    def written(cls, folder: Path) -> "Mixture":
        torch.manual_seed(7)
        config = transformers.MixtralConfig(
            **WIDTHS, intermediate_size=52, num_key_value_heads=1, num_local_experts=3
        )
        transformers.MixtralForCausalLM(config).save_pretrained(folder / "base")
        _describe(folder, {"input_ids": IDS.tolist()}, "CAUSAL_LM", ["w1", "w2"])
        mixture = cls(folder)
        mixture.tolerance = 1e-5 * float(np.abs(mixture.logits(folder / "base")).max())
        return mixture

    def logits(self, folder: Path) -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()
        with torch.no_grad():
            return model(torch.tensor(IDS)).logits.numpy()

    def opened(self, folder: Path) -> np.ndarray:
        """The logits of the checkpoint with an adapter of PEFT's in it."""
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(None):
            merged = Path(name) / "merged"
            status = command(["merge", *map(str, (folder, "--base", self.folder / "base", merged))])
            return self.logits(merged) if status == 0 else np.full(1, np.nan)


def _describe(folder: Path, inputs: dict, task: str, targets: str | list[str]) -> None:
    """What `compat_reader` must know of a model."""
    about = {"task_type": task, "target_modules": targets}
    (folder / "inputs.json").write_text(json.dumps(inputs | about))


def prepare(work: Path, families=FAMILIES, adapters=ADAPTERS) -> dict[str, Model | Mixture]:
    """Write models and adapters for `compat_reader`; the models by family."""
    models: dict[str, Model | Mixture] = {"mixtral": Mixture.written(work / "mixtral")}
    for family in families:
        folder = work / family
        pair = twins(family, folder / "base")
        task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
        inputs = {name: x.tolist() for name, x in pair.inputs.items()}
        _describe(folder, inputs, task, FAMILIES[family][2])
        between = np.abs(pair.flax_logits() - pair.torch_logits()).max()
        largest = np.abs(pair.torch_logits()).max()
        model = models[family] = Model(pair, max(1e-5 * largest, 2 * between))
        for seed, name in enumerate(adapters):
            config = RandLoraConfig(
                r=7,
                randlora_alpha=14,
                target_modules=FAMILIES[family][2],
                task_type=task,
                projection_prng_key=NATIVE_KEY,
                base_model_name_or_path=str(folder / "base"),
                **ADAPTERS[name],
            )
            adapted = randomised(get_peft_model(pair.flax, config), seed)
            model.expected[name] = pair.flax_logits(adapted)
            moved = np.std(model.expected[name] - pair.flax_logits())
            assert moved >= 0.1 * np.std(pair.flax_logits()), "the adapter hardly moves the logits"
            adapted.save_pretrained(folder / name)
    return models


def randomised(model, seed):
    """Random numbers in all that trains."""
    rng, params = np.random.default_rng(seed), dict(model.params)

    def move(path, x):
        lam = "randlora_lambda" in jax.tree_util.keystr(path)
        scale = 0.3 if lam else 0.3 * float(jnp.abs(x).max()) + 0.01
        return x + jnp.asarray(rng.normal(0, scale, x.shape), x.dtype)

    params["randlora"] = jax.tree_util.tree_map_with_path(move, params["randlora"])
    model.params = params
    return model


@dataclass
class Outcome:
    """What one release of PEFT made of our files, and we of its own."""

    versions: dict[str, str]
    errors: dict[str, float] = field(default_factory=dict)  # as a share of the tolerance
    refused: dict[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """Every route that did not do as it should."""
        wrong = []
        for name, error in self.errors.items():
            if name.endswith(MIXED):
                wrong.append(f"{name}: was not refused")
            elif not error <= 1:
                wrong.append(f"{name}: differs by {error:.3g} times what is allowed")
        for name, message in self.refused.items():
            if (
                not name.endswith(MIXED)
                or "PRNG initialisation key must be the same" not in message
            ):
                wrong.append(f"{name}: {message}")
        return wrong


def compare(models: dict[str, Model | Mixture], out: Path) -> Outcome:
    notes = json.loads((out / "notes.json").read_text())
    versions = {name: notes.pop(name) for name in ("peft", "transformers", "torch")}
    outcome = Outcome(versions, refused=notes)
    for name, logits in np.load(out / "logits.npz").items():
        family, *adapter = name.split("|")
        model = models[family]
        if len(adapter) == 1:
            expected = model.opened(out / adapter[0] / family)
        else:
            expected = model.expected[adapter[0]]
        outcome.errors[name] = float(np.abs(logits - expected).max() / model.tolerance)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """A row for each release, a column for each route: how many files came out right."""
    columns = list(dict.fromkeys(n.split("|")[-1] for o in outcomes for n in o.errors | o.refused))
    own = {c: c.replace("native", "its own") for c in NATIVE}
    heads = ["PEFT", "transformers", *(own.get(c, c) for c in columns)]
    rows = [heads, ["---"] * len(heads)]
    for outcome in outcomes:
        row = [outcome.versions["peft"], outcome.versions["transformers"]]
        wrong = {failure.split(":")[0] for failure in outcome.failures()}
        for column in columns:
            names = [n for n in outcome.errors | outcome.refused if n.split("|")[-1] == column]
            right = sum(name not in wrong for name in names)
            row.append(f"{right} of {len(names)}" + " refused" * (column == MIXED))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    warnings.simplefilter("ignore")
    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name) / "work"
        models = prepare(work)
        outcomes = []
        reader = Path(__file__).with_name("compat_reader.py")
        for python in sys.argv[1:]:
            out = Path(name) / f"out{len(outcomes)}"
            subprocess.run([python, "-W", "ignore", reader, work, out], check=True)
            outcomes.append(compare(models, out))
    print(table(outcomes))
    failures = 0
    for outcome in outcomes:
        largest = max(error for name, error in outcome.errors.items() if not name.endswith(MIXED))
        print(f"PEFT {outcome.versions['peft']}: largest error {largest:.2f} of what is allowed")
        for failure in outcome.failures():
            failures += 1
            print("  FAILED", failure)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
