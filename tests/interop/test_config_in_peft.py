"""PEFT's configuration and ours: the same fields, either reads what the other writes."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import ConfigError
from randlora_jax.interop.strict_json import JsonObject
from test_config import FULL

pytestmark = pytest.mark.torch


def test_fields_and_defaults_are_pefts() -> None:
    theirs = peft.RandLoraConfig()
    ours = RandLoraConfig()
    for item in dataclasses.fields(theirs):
        if item.name != "peft_version":  # PEFT records its own
            assert getattr(ours, item.name) == getattr(theirs, item.name), item.name
    extra = {f.name for f in dataclasses.fields(ours)} - {
        f.name for f in dataclasses.fields(theirs)
    }
    assert extra == {"projection_source", "unknown"}


def as_peft_has_it(value: Any) -> Any:
    if isinstance(value, set | list | tuple):
        return sorted(value, key=str)
    return dict(value) if isinstance(value, JsonObject) else value


@pytest.mark.parametrize("fields", [{}, FULL, {"target_modules": r".*\.(q|v)"}])
def test_peft_reads_what_we_write(fields: dict[str, Any], tmp_path: Path) -> None:
    RandLoraConfig(**fields).save_pretrained(tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = peft.PeftConfig.from_pretrained(tmp_path / "new" / "folder")
    expected = peft.RandLoraConfig(**fields)
    for item in dataclasses.fields(expected):
        assert as_peft_has_it(getattr(read, item.name)) == as_peft_has_it(
            getattr(expected, item.name)
        ), item.name


@pytest.mark.parametrize("fields", [{}, FULL, {"target_modules": r".*\.(q|v)"}])
def test_we_read_what_peft_writes(fields: dict[str, Any], tmp_path: Path) -> None:
    peft.RandLoraConfig(**fields).save_pretrained(tmp_path)
    read = RandLoraConfig.from_pretrained(tmp_path)
    expected = RandLoraConfig(**fields, projection_source="file", peft_version=peft.__version__)
    # PEFT keeps target_modules in a set, whose order differs from run to run.
    assert as_peft_has_it(read.target_modules) == as_peft_has_it(expected.target_modules)
    assert dataclasses.replace(read, target_modules=expected.target_modules) == expected


def test_task_type_takes_pefts_enum() -> None:
    config = RandLoraConfig(task_type=peft.TaskType.SEQ_CLS)
    assert type(config.task_type) is str
    assert config == RandLoraConfig(task_type="SEQ_CLS")
    for task in peft.TaskType:
        RandLoraConfig(task_type=task.value)


def test_key_range_is_torchs() -> None:
    generator = torch.Generator()
    for key in (-(2**63), 2**64 - 1):
        assert RandLoraConfig(projection_prng_key=key).projection_prng_key == key
        generator.manual_seed(key)
    for key in (-(2**63) - 1, 2**64):
        with pytest.raises(ConfigError, match="projection_prng_key"):
            RandLoraConfig(projection_prng_key=key)
        with pytest.raises(ValueError, match="Overflow"):
            generator.manual_seed(key)
