"""docs/files.md: its commands and its lines of Python run, on an adapter that PEFT saved."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from peft_side import save_adapter, save_base
from randlora_jax.interop.peft_dir import read_adapter
from usages import fences

from randlora_jax.commands.main import main

pytestmark = pytest.mark.torch

PAGE = Path(__file__).parents[2] / "docs" / "files.md"


def test_it_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_base("opt", tmp_path / "my-model", torch.float32)
    save_adapter("opt", tmp_path / "my-model", tmp_path / "my-adapter", torch.float32)
    without = {"save_projection": False}
    save_adapter("opt", tmp_path / "my-model", tmp_path / "theirs", torch.float32, **without)

    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len({command[1] for command in commands}) == 6
    for program, *arguments in commands:
        assert program == "randlora-jax"
        assert main(arguments) == 0, (arguments, capsys.readouterr().err)
    assert read_adapter("small").bases is not None and read_adapter("tiny").bases is None
    assert Path("merged/model.safetensors").exists() and Path("lora/adapter_config.json").exists()

    (fence,) = fences(PAGE)
    exec(fence, {})
    assert read_adapter("rewritten").layers.keys() == read_adapter("my-adapter").layers.keys()
