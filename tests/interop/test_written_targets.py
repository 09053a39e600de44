"""Targets that we write: PEFT is asked which layers it wraps by them."""

from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import TargetError
from randlora_jax.interop.targets import (
    select,
    write_targets,
)

pytestmark = pytest.mark.torch

PARTS = ["layers", "h", "0", "1", "10", "q", "k", "q_proj", "classifier", "pre_classifier"]
module_names = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)


def build(linear: set[str], other: set[str]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name in sorted(linear | other):
        module = root
        *parents, leaf = name.split(".")
        for part in parents:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.add_module(leaf, torch.nn.Linear(2, 2) if name in linear else torch.nn.ReLU())
    return root


@st.composite
def trees(draw: st.DrawFn) -> tuple[set[str], set[str], set[str]]:
    """(linear layers, those adapted, other modules), none of them inside another."""
    names = draw(st.sets(module_names, min_size=2, max_size=40))
    leaves = sorted(n for n in names if not any(m.startswith(f"{n}.") for m in names))
    linear = set(draw(st.lists(st.sampled_from(leaves), min_size=1, unique=True)))
    adapted = set(draw(st.lists(st.sampled_from(sorted(linear)), min_size=1, unique=True)))
    return linear, adapted, set(leaves) - linear


@settings(max_examples=100)
@given(trees())
def test_peft_wraps_exactly_the_written_targets(tree: tuple[set[str], set[str], set[str]]) -> None:
    linear, adapted, other = tree
    model = build(linear, other)
    written = write_targets(adapted, linear | other)
    fields: Any = {"r": 1, "target_modules": written if isinstance(written, str) else [*written]}
    wrapped = peft.get_peft_model(model, peft.RandLoraConfig(**fields))
    assert set(wrapped.base_model.targeted_module_names) == adapted
    config = RandLoraConfig(target_modules=written)
    assert set(select(config, sorted(linear), other)) == adapted


def test_more_than_twenty_written_targets() -> None:
    """From 20 entries on PEFT shortens the list itself; the layers must stay the same."""
    linear = {f"m.layers.{i}.{part}" for i in range(30) for part in "qkv"}
    adapted = {f"m.layers.{i}.q" for i in range(0, 30, 2)} | {f"m.layers.{i}.k" for i in range(25)}
    written = write_targets(adapted, linear)
    assert len(written) == 40
    wrapped = peft.get_peft_model(
        build(linear, set()), peft.RandLoraConfig(r=1, target_modules=list(written))
    )
    assert set(wrapped.base_model.targeted_module_names) == adapted


def test_written_targets_are_short() -> None:
    modules = ["m.0.q", "m.1.q", "m.0.v", "m.1.v", "m.0.norm", "head"]
    assert write_targets(["m.0.q", "m.1.q"], modules) == ("q",)
    assert write_targets(["m.0.q", "m.1.q", "head"], modules) == ("head", "q")
    assert write_targets(["m.1.v", "m.0.q", "m.1.q"], modules) == ("1.v", "q")
    assert write_targets(["q", "a.v"], ["b.q", "c.v"]) == r"a\.v|q"  # "q" would take "b.q" too
    with pytest.raises(TargetError, match="no layer is adapted"):
        write_targets([], modules)
