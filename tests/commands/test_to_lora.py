"""randlora-jax to-lora: what PEFT computes with the LoRA it writes, and how good that can be."""

import json
import re
from functools import partial

import numpy as np
import peft
import pytest
import torch
from families import FAMILIES
from peft_side import assert_same_logits, load, logits, save_adapter, save_base
from randlora_jax.interop.config import CONFIG_NAME
from safetensors.torch import save_file
from torch_files import load_file

from randlora_jax.commands.low_rank import at_energy, factor
from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch


def run(folder, *more):
    command = ["to-lora", folder / "adapter", "--base", folder / "base", folder / "lora", *more]
    return main([*map(str, command)])


def deltas(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def open_lora(family, folder):
    model = peft.PeftModel.from_pretrained(load(family, folder / "base"), folder / "lora").eval()
    assert model.peft_config["default"].peft_type == "LORA"
    return model


WHOLE = {
    "bert": {"bias": "all", "modules_to_save": ["pooler"]},
    "gpt2": {"bias": "randlora_only"},
    "llama": {"modules_to_save": ["norm"]},
    "opt": {"target_modules": ["q_proj", "fc1", "lm_head"]},  # tied, which LoRA does not mind
}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_at_full_rank_it_is_the_adapter(family, plain, tmp_path):
    base = save_base(family, tmp_path / "base")
    changes = {} if plain else WHOLE[family]
    model = save_adapter(family, base, tmp_path / "adapter", **changes)
    assert run(tmp_path, "--rank", "1000") == 0
    lora = open_lora(family, tmp_path)
    expected = deltas(model)
    found = deltas(lora)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert np.abs(found[name] - delta).max() <= 1e-6 * np.abs(delta).max(), name
    assert_same_logits(logits(lora), logits(model), logits(load(family, base)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_lora_of_that_rank_is_closer(family, tmp_path, capsys):
    base = save_base(family, tmp_path / "base")
    model = save_adapter(family, base, tmp_path / "adapter")
    assert run(tmp_path, "--rank", "13", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    found, kept = deltas(open_lora(family, tmp_path)), []
    for name, delta in deltas(model).items():
        s = np.linalg.svd(delta.astype("f8"), compute_uv=False) ** 2
        share = s[:13].sum() / s.sum()  # Eckart and Young
        assert report["layers"][name]["energy_kept"] == pytest.approx(share, rel=1e-6)
        assert report["layers"][name]["rank"] == min(13, len(s))
        assert np.square(delta - found[name]).sum() == pytest.approx(s[13:].sum(), rel=1e-4)
        kept.append((s[:13].sum(), s.sum()))
    kept, total = np.sum(kept, 0)
    assert report["energy_kept"] == pytest.approx(kept / total, rel=1e-6)


@pytest.mark.parametrize("option", ["--rank", "--energy"])
@pytest.mark.parametrize("value", ["x", "-1", "0", "nan"])
def test_ranks_and_shares_that_are_none(option, value, tmp_path, capsys):
    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
    assert run(tmp_path, f"{option}={value}") == 2
    said = capsys.readouterr().err
    assert re.search(f"{option}: expected a (rank|share) .*, found {value}", said)


def test_ranks_by_energy(tmp_path, capsys):
    base = save_base("llama", tmp_path / "base")
    model = save_adapter("llama", base, tmp_path / "adapter")
    assert run(tmp_path, "--energy", "0.9", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    ranks = {}
    for name, delta in deltas(model).items():
        s = np.linalg.svd(delta.astype("f8"), compute_uv=False) ** 2
        ranks[name] = int(np.argmax(np.cumsum(s) / s.sum() >= 0.9)) + 1
    assert {name: layer["rank"] for name, layer in report["layers"].items()} == ranks
    assert len(set(ranks.values())) > 2
    lora = open_lora("llama", tmp_path)  # refuses other ranks than its config's
    for name, module in lora.base_model.model.named_modules():
        if name in ranks:
            assert module.r["default"] == ranks[name] and module.scaling["default"] == 1
    capsys.readouterr()
    assert run(tmp_path, "--energy", "0.9", "--force") == 0
    assert "what is lost moves the logits" in capsys.readouterr().out
    assert run(tmp_path, "--energy", "1", "--force") == 0
    assert "what is lost" not in capsys.readouterr().out
    full = open_lora("llama", tmp_path)
    assert_same_logits(logits(full), logits(model), logits(load("llama", base)))


TAKEN = {
    "an expression": {"target_modules": r".*layers\.\d\.(self_attn\.[qv]_proj|mlp\.down_proj)"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "all": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("taken", TAKEN)
def test_targets_are_a_list(taken, tmp_path):
    """Servers such as SGLang read no expression; in PEFT it takes the same layers."""
    base = save_base("llama", tmp_path / "base")
    model = save_adapter("llama", base, tmp_path / "adapter", **TAKEN[taken])
    assert run(tmp_path, "--rank", "3") == 0
    config = json.loads((tmp_path / "lora" / CONFIG_NAME).read_text())
    assert isinstance(config["target_modules"], list) and config["layers_to_transform"] is None
    assert deltas(open_lora("llama", tmp_path)).keys() == deltas(model).keys()


@pytest.mark.parametrize("energy", ["0.9", "0.97"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_r_is_the_largest_rank(family, energy, tmp_path):
    """Servers size their memory by r, and scale every layer by lora_alpha / r."""
    base = save_base(family, tmp_path / "base")
    save_adapter(family, base, tmp_path / "adapter")
    assert run(tmp_path, "--energy", energy) == 0
    config = json.loads((tmp_path / "lora" / CONFIG_NAME).read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    found = deltas(open_lora(family, tmp_path))
    ranks = {name: len(tensors[f"base_model.model.{name}.lora_A.weight"]) for name in found}
    assert len(set(ranks.values())) > 1
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert len(config["rank_pattern"]) == sum(r != config["r"] for r in ranks.values())
    for name, delta in found.items():
        B, A = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
        expected = (B @ A).T.numpy() if config["fan_in_fan_out"] else (B @ A).numpy()
        assert np.abs(delta - expected).max() <= 1e-6 * np.abs(expected).max(), name


def test_ranks_belong_to_layers_by_their_whole_name(tmp_path):
    """One layer's name may end in another's, and dots are no wildcards."""
    from randlora_jax import RandLoraConfig
    from randlora_jax.commands.to_lora import lora_config

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(8, 8)

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.block = Inner()

    ranks = {"lin": 3, "block.lin": 5}
    for names in (["lin", "block.lin"], ["block.lin", "lin"]):
        config = lora_config(RandLoraConfig(), {name: ranks[name] for name in names}, False)
        (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
        model = peft.get_peft_model(Outer(), peft.PeftConfig.from_pretrained(tmp_path))
        inner = model.base_model.model
        assert (inner.lin.r["default"], inner.block.lin.r["default"]) == (3, 5)
        assert (inner.lin.scaling["default"], inner.block.lin.scaling["default"]) == (1, 1)


def test_an_adapter_that_does_nothing_becomes_one_that_does_nothing():
    nothing = factor(np.zeros((4, 3), np.float32), lambda shares: 2)
    assert nothing.rank == 1 and nothing.share == 1
    assert not (nothing.B @ nothing.A).any()


def test_a_low_rank_is_found_as_it_is(rng):
    low = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 20))).astype(np.float32)
    for delta in (low, low.T):
        found = factor(delta, partial(at_energy, 1 - 1e-9))
        assert found.rank == 3 and found.A.shape == (3, delta.shape[1])
        np.testing.assert_allclose(found.B @ found.A, delta, atol=1e-5 * np.abs(delta).max())
        np.testing.assert_allclose(  # and both factors are of one size
            np.linalg.norm(found.A, axis=1), np.linalg.norm(found.B, axis=0), rtol=1e-4
        )


WIDE = {"hidden_size": 768, "intermediate_size": 832, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Layers so large that they are not decomposed whole, of (out, in) 768 to 832 and back."""
    folder = tmp_path_factory.mktemp("large")
    base = save_base("llama", folder / "base", num_attention_heads=4, **WIDE)
    targets = ["q_proj", "gate_proj", "down_proj"]
    return folder, save_adapter("llama", base, folder / "adapter", r=32, target_modules=targets)


def test_large_layers_are_nearly_as_good_as_exact(large, capsys):
    folder, model = large
    reports, shares, written = {}, {}, {}
    for name, more in {"nearly": (), "exact": ("--exact",)}.items():
        assert run(folder, "--rank", "48", "--json", "--force", *more) == 0
        reports[name] = json.loads(capsys.readouterr().out)
        written[name] = (folder / "lora" / "adapter_model.safetensors").read_bytes()
        found = deltas(open_lora("llama", folder))
        for layer, delta in deltas(model).items():
            shares[name, layer] = 1 - np.square(delta - found[layer]).sum() / np.square(delta).sum()
    for layer, exact in reports["exact"]["layers"].items():
        nearly = reports["nearly"]["layers"][layer]
        ratio = nearly["energy_kept"] / exact["energy_kept"]
        assert 0.9999 <= ratio <= 1 + 1e-6  # the energies were summed otherwise
        assert nearly["energy_kept"] == pytest.approx(shares["nearly", layer], rel=1e-4)
        assert exact["energy_kept"] == pytest.approx(shares["exact", layer], rel=1e-4)
    assert written["nearly"] != written["exact"]


@pytest.mark.parametrize("energy", [0.05, pytest.param(0.3, marks=pytest.mark.long)])
def test_large_layers_by_energy(energy, large, capsys):
    """Of full rank and all alike: no LoRA of low rank keeps 0.3, and one does that keeps 0.05."""
    folder, model = large
    assert run(folder, "--energy", str(energy), "--json", "--force") == 0
    report = json.loads(capsys.readouterr().out)
    for name, delta in deltas(model).items():
        s = np.linalg.svd(delta, compute_uv=False).astype("f8") ** 2
        layer, best = report["layers"][name], at_energy(energy, np.cumsum(s) / s.sum())
        assert layer["energy_kept"] >= energy and layer["rank"] == best


BEYOND = {
    "alpha": ({"randlora_alpha": 1e308}, 1, 1),
    "alpha, float32's": ({"randlora_alpha": 1e41}, 1, 1),
    "lambda": ({"randlora_alpha": 1000}, 1e38, 1),
    "lambda and gamma": ({}, 1e30, 1e30),
}


@pytest.mark.parametrize("kind", sorted(BEYOND))
def test_numbers_beyond_float32_are_refused(kind, tmp_path, capsys):
    """By every command that forms delta_W, in words, with nothing written."""
    changes, lam, gamma = BEYOND[kind]
    base = save_base("llama", tmp_path / "base")
    save_adapter("llama", base, tmp_path / "adapter")
    multiply(tmp_path / "adapter", lam, gamma, **changes)
    inputs = [tmp_path / "adapter", "--base", base]
    for line in (
        ["to-lora", *inputs, tmp_path / "lora", "--rank", "4"],
        ["to-lora", *inputs, tmp_path / "lora", "--energy", "0.5", "--exact"],
        ["merge", *inputs, tmp_path / "merged"],
        ["inspect", *inputs, "--plot", tmp_path / "plot.png"],
        ["verify", *inputs],
    ):
        assert main([*map(str, line), "--json"]) == 1, line
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert not report["good"], line
        assert "too large" in report["error"] or "too strong" in report["error"], line
        assert "Warning" not in err and "overflow encountered" not in err, line
    assert not any((tmp_path / name).exists() for name in ("lora", "merged", "plot.png"))


def test_numbers_that_float32_can_hold_are_kept(tmp_path, capsys):
    base = save_base("llama", tmp_path / "base")
    save_adapter("llama", base, tmp_path / "adapter")
    multiply(tmp_path / "adapter", 1e20, 1e12)
    model = peft.PeftModel.from_pretrained(load("llama", base), tmp_path / "adapter")
    assert run(tmp_path, "--rank", "1000", "--json") == 0
    assert json.loads(capsys.readouterr().out)["energy_kept"] == pytest.approx(1)
    found = deltas(open_lora("llama", tmp_path))
    for name, delta in deltas(model).items():
        assert 1e28 < np.abs(delta).max() < np.inf
        assert np.abs(found[name] - delta).max() <= 1e-6 * np.abs(delta).max(), name
    command = ["inspect", tmp_path / "adapter", "--base", base, "--plot", tmp_path / "plot.png"]
    assert main([*map(str, command), "--json"]) == 0
    norms = json.loads(capsys.readouterr().out)["plot"]["norms"]
    for name, delta in deltas(model).items():
        assert norms[name] == pytest.approx(np.linalg.norm(delta.astype("f8")), rel=1e-5)


def multiply(folder, lam, gamma, **changes):
    """Change an adapter's numbers by factors, and fields of its config."""
    path = folder / "adapter_model.safetensors"
    factors = {"randlora_lambda": lam, "randlora_gamma": gamma}
    tensors = {k: x * factors.get(k.rpartition(".")[2], 1) for k, x in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


def test_misuse(tmp_path, capsys):
    save_base("llama", tmp_path / "base")
    save_adapter("llama", tmp_path / "base", tmp_path / "adapter")
    for wrong in (["--rank", "0"], ["--energy", "1.5"], ["--rank", "2", "--energy", "0.5"], []):
        assert run(tmp_path, *wrong) == 2
    assert run(tmp_path, "--rank", "2") == 0
    assert run(tmp_path, "--rank", "3") == 2
    assert "--force" in capsys.readouterr().err
    source = str(tmp_path / "adapter")
    command = ["to-lora", source, "--base", str(tmp_path / "base"), source, "--rank", "2"]
    assert main([*command, "--force"]) == 2
    assert "holds the adapter itself" in capsys.readouterr().err
    assert main(["inspect", source]) == 0
