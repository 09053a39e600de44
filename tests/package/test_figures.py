"""Every picture of docs/ says where it comes from, and is what its kept numbers draw."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "benchmarks"))
imread = pytest.importorskip("matplotlib.image").imread
figures = importlib.import_module("figures")
measured, pictures, style = (importlib.import_module(n) for n in ("measured", "pictures", "style"))


def kept(name):
    return DOCS / "figures" / Path(figures.FIGURES[name].numbers).name


def test_every_picture_has_its_command():
    pictures = {path.name for path in DOCS.rglob("*") if path.suffix in (".png", ".svg", ".jpg")}
    assert pictures == set(figures.FIGURES) | figures.BY_HAND
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {source.make for source in figures.FIGURES.values()} <= set(targets)


def test_the_numbers_of_every_picture_are_kept():
    assert {path.name for path in (DOCS / "figures").iterdir()} == {
        kept(name).name for name in figures.FIGURES
    }


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_a_picture_shows_what_is_kept(name, tmp_path):
    """To a few pixels, which another processor may draw otherwise; a bar or a point has more."""
    measured.draw(figures.FIGURES[name].drawing, kept(name), tmp_path / name)
    drawn, shown = imread(tmp_path / name), imread(DOCS / name)
    assert drawn.shape == shown.shape, "make figures"
    assert (abs(drawn - shown).max(-1) > 0.2).mean() < 1e-4, "make figures"
    found = json.loads(kept(name).read_text())
    assert found["command"].startswith(f"make {figures.FIGURES[name].make}")
    assert re.fullmatch("[0-9a-f]{7,}", found["commit"])


def test_what_the_demos_keep_can_be_drawn(tmp_path):
    """Numbers of the same form as theirs, at the end of runs that take minutes."""
    rng = np.random.default_rng(0)
    run = {"losses": [2.0, 1.0, 0.5], "checked_at": [0, 3], "accuracies": [0.2, 0.9]}
    demo = {
        name: {**run, "test_accuracy": 0.9}
        for name in ("RandLoRA", "head alone, its best rate", "head alone, same rates")
    }
    whole = {f"layers.{i}.mlp.{kind}": rng.normal(size=(8, 6)) for i in (0, 1)
             for kind in pictures.KINDS}  # fmt: skip
    low = {name: rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6)) for name in whole}
    llm = pictures.changed(whole, low)
    above = {name: sum(x > 1e-6 for x in values) for name, values in llm["spectra"].items()}
    assert above == {"RandLoRA": 6, "LoRA": 2} and llm["layer"] == 1
    norm = np.linalg.norm(whole["layers.1.mlp.q_proj"])
    assert llm["norms"]["q_proj"][1] == pytest.approx(norm, rel=1e-3)
    for name, numbers in (("demo-curves.png", demo), ("demo-llm.png", llm)):
        measured.keep(tmp_path / "kept.json", "make demo", numbers)
        measured.draw(figures.FIGURES[name].drawing, tmp_path / "kept.json", tmp_path / name)
        assert imread(tmp_path / name).std() > 0.05


def test_what_is_kept_is_read_as_it_was(tmp_path):
    numbers = {"a, [b]": {"x": [1, 0.5], "y": [[1], [2.0, 3]]}}
    measured.keep(tmp_path / "kept.json", "make this", numbers)
    found = json.loads((tmp_path / "kept.json").read_text())
    assert found["measured"] == numbers and found["command"] == "make this"


def test_a_method_looks_alike_whoever_runs_it():
    ours, theirs = style.look("ours, auto"), style.look("PEFT RandLoRA")
    assert ours["color"] == theirs["color"] == style.look("RandLoRA, r 16")["color"]
    assert theirs["markerfacecolor"] == "white" and "markerfacecolor" not in ours
    assert style.look("rsLoRA, rank 8") == style.look("LoRA") != style.look("VeRA")
    with pytest.raises(ValueError, match="'DoRA': expected a name with one of"):
        style.look("DoRA")
