"""Opens adapters by every route that PEFT and transformers have, and writes some of its own.

Run by `compat.py` with the Python of another environment, so this file needs only torch, peft and
transformers of whatever release:

    python tests/compat_reader.py WORK OUT

WORK has a folder for each model: ``base`` (a checkpoint), ``inputs.json``, and adapters. OUT gets
``logits.npz`` with an array for each "model|adapter|route", ``notes.json`` with the versions and
the error of each route that raised one, and ``<native>/<model>``: adapters by this release, whose
logits are at "model|native".
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

CLASSES = {
    "SEQ_CLS": (
        transformers.AutoModelForSequenceClassification,
        peft.AutoPeftModelForSequenceClassification,
    ),
    "CAUSAL_LM": (transformers.AutoModelForCausalLM, peft.AutoPeftModelForCausalLM),
}
EAGER = {"attn_implementation": "eager"}
NATIVE_KEY = 42
NATIVE = {  # adapters that a release writes itself
    "native": {},
    "native, biases": {"bias": "all"},
    "native, one layer": {"layers_to_transform": [1]},
}


class Reader:
    """One base model and the routes by which an adapter gets into it."""

    def __init__(self, folder: Path) -> None:
        self.base_path = folder / "base"
        inputs = json.loads((folder / "inputs.json").read_text())
        self.task, self.targets = inputs.pop("task_type"), inputs.pop("target_modules")
        self.inputs = {name: torch.tensor(x) for name, x in inputs.items()}
        self.auto, self.auto_peft = CLASSES[self.task]

    def base(self):
        return self.auto.from_pretrained(self.base_path, **EAGER).eval()

    def logits(self, model) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(**self.inputs).logits.numpy()

    def routes(self, folder: Path):
        """By name, a function from the adapter's folder to a model."""
        found = {
            "PeftModel": self.by_peft_model,
            "low_cpu_mem_usage": self.with_low_memory,
            "second adapter": self.as_a_second_adapter,
            "AutoPeftModelFor": self.by_auto_peft_model,
            "load_adapter": self.by_transformers_load_adapter,
            "from_pretrained": self.by_transformers_from_pretrained,
        }
        if peft.PeftConfig.from_pretrained(folder).bias != "none":
            del found["second adapter"]  # PEFT takes one adapter only that trains biases
        elif folder.name.startswith("jax"):
            found["beside a native one"] = self.beside_a_native_one
        return found

    def by_peft_model(self, folder: Path):
        return peft.PeftModel.from_pretrained(self.base(), folder)

    def with_low_memory(self, folder: Path):
        return peft.PeftModel.from_pretrained(self.base(), folder, low_cpu_mem_usage=True)

    def as_a_second_adapter(self, folder: Path):
        """Beside a fresh one with the same settings, which any adapter of its key may join."""
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = peft.get_peft_model(self.base(), config, adapter_name="first")
        model.load_adapter(folder, "second")
        model.set_adapter("second")
        return model

    def by_auto_peft_model(self, folder: Path):
        return self.auto_peft.from_pretrained(folder, **EAGER)

    def by_transformers_load_adapter(self, folder: Path):
        model = self.base()
        model.load_adapter(folder)
        return model

    def by_transformers_from_pretrained(self, folder: Path):
        return self.auto.from_pretrained(folder, **EAGER)

    def beside_a_native_one(self, folder: Path):
        """Must be refused where the bases are not those that PyTorch draws from the user's key."""
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        config.projection_prng_key = NATIVE_KEY
        model = peft.get_peft_model(self.base(), config, adapter_name="first")
        model.load_adapter(folder, "second")
        return model

    def write_native(self, folder: Path, **settings) -> np.ndarray:
        """Save an adapter by this release of PEFT; the logits that it has with what it saved."""
        config = peft.RandLoraConfig(
            r=7,
            randlora_alpha=14,
            target_modules=self.targets,
            task_type=self.task,
            **settings,
        )
        model = peft.get_peft_model(self.base(), config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p) * (1 if "lambda" in name else p.abs().max()))
        model.save_pretrained(folder)
        return self.logits(self.by_peft_model(folder))


def read_all(work: Path, out: Path) -> None:
    found: dict[str, np.ndarray] = {}
    notes: dict[str, str] = {
        module.__name__: module.__version__ for module in (peft, transformers, torch)
    }
    for folder in sorted(work.iterdir()):
        reader = Reader(folder)
        for adapter in sorted(path.parent for path in folder.glob("*/adapter_config.json")):
            for route, opens in reader.routes(adapter).items():
                name = f"{folder.name}|{adapter.name}|{route}"
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        found[name] = reader.logits(opens(adapter))
                except Exception as error:
                    notes[name] = f"{type(error).__name__}: {error}"[:400]
        for native, settings in NATIVE.items():
            if "layers_to_transform" in settings and isinstance(reader.targets, str):
                continue  # an expression names its layers itself
            logits = reader.write_native(out / native / folder.name, **settings)
            found[f"{folder.name}|{native}"] = logits
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "logits.npz", **found)
    (out / "notes.json").write_text(json.dumps(notes, indent=1))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    read_all(*map(Path, sys.argv[1:]))
