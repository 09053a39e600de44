"""docs/maxtext.md's lines run, where what they import of MaxText is a copy of its layers."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import optax
from flax import nnx
from rebuilt import IDS
from test_maxtext import MAXTEXT, MaxText
from usages import fences

from randlora_jax import AdapterParam

(FENCE,) = fences(Path(__file__).parents[2] / "docs/maxtext.md")


def pyconfig(argv):
    config, _ = MAXTEXT[argv[1]]
    config.mesh_axes = ("data",)
    return config


def test_it_runs_as_it_stands(tmp_path, monkeypatch):
    devices = SimpleNamespace(create_device_mesh=lambda config: np.array(jax.devices()[:1]))

    def transformer(config, mesh, quant, rngs):
        return MaxText(config, nnx.Rngs(rngs.params()))

    modules = {
        "maxtext.configs": {"pyconfig": SimpleNamespace(initialize=pyconfig)},
        "maxtext.models": {"models": SimpleNamespace(Transformer=transformer)},
        "maxtext.utils": {"maxtext_utils": devices},
    }
    monkeypatch.setitem(sys.modules, "maxtext", ModuleType("maxtext"))
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["tune.py", "dense"])

    page = {}
    exec(FENCE, page)
    model, optimizer = page["model"], page["optimizer"]

    def loss(model):
        return optax.safe_norm(model(IDS), 1e-6)

    before = loss(model)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model)
    optimizer.update(model, grads)
    assert loss(model) < before
    model.save_pretrained(tmp_path)
    assert {name.partition(".")[0] for name in model.delta_weights()} == {"decoder"}
