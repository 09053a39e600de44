"""RandLoraConfig: PEFT's fields and file, louder about mistakes."""

import copy
import dataclasses
import inspect
import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError

# The fields of peft.RandLoraConfig in PEFT 0.16.0, the oldest release that must read our files.
PEFT_0_16_FIELDS = {
    *("task_type", "peft_type", "auto_mapping"),
    *("base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
    *("randlora_dropout", "fan_in_fan_out", "randlora_alpha", "bias", "modules_to_save"),
    *("init_weights", "layers_to_transform", "layers_pattern"),
}

FULL: dict[str, Any] = {
    "r": 7,
    "target_modules": ["query", "value"],
    "projection_prng_key": 2**62 + 3,
    "sparse": True,
    "very_sparse": True,
    "randlora_dropout": 0.25,
    "fan_in_fan_out": True,
    "randlora_alpha": 3.5,
    "bias": "randlora_only",
    "modules_to_save": ["head", "classifier"],
    "init_weights": False,
    "layers_to_transform": [3, 1],
    "layers_pattern": ["layers", "h"],
    "task_type": "TOKEN_CLS",
    "auto_mapping": {"base_model_class": "B", "parent_library": "p"},
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
}


def write(folder: Path, **fields: Any) -> None:
    text = json.dumps({"peft_type": "RANDLORA", **fields})
    (folder / CONFIG_NAME).write_text(text)


def test_file_holds_only_fields_of_every_supported_peft() -> None:
    assert set(RandLoraConfig(**FULL).to_dict()) == PEFT_0_16_FIELDS
    assert RandLoraConfig(peft_version="0.18.1").to_dict()["peft_version"] == "0.18.1"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("r", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", [""]),
        ("target_modules", ["q", 3]),
        ("target_modules", "(q"),
        ("target_modules", {"q": 1}),
        ("target_modules", 3),
        ("projection_prng_key", 0.5),
        ("projection_prng_key", False),
        ("save_projection", 1),
        ("save_projection", None),
        ("sparse", "yes"),
        ("very_sparse", 0),
        ("randlora_dropout", 1.0),
        ("randlora_dropout", -0.1),
        ("randlora_dropout", True),
        ("randlora_dropout", float("nan")),
        ("fan_in_fan_out", None),
        ("randlora_alpha", 0),
        ("randlora_alpha", float("inf")),
        ("randlora_alpha", 10**400),
        ("randlora_alpha", "640"),
        ("bias", "lora_only"),
        ("bias", None),
        ("modules_to_save", "classifier"),
        ("modules_to_save", ["(a"]),
        ("init_weights", "gaussian"),
        ("layers_to_transform", -1),
        ("layers_to_transform", True),
        ("layers_to_transform", [0, -1]),
        ("layers_to_transform", "0"),
        ("layers_pattern", "(h"),
        ("layers_pattern", 4),
        ("task_type", "CLASSIFY"),
        ("auto_mapping", ["a"]),
        ("auto_mapping", {"a": float("nan")}),
        ("auto_mapping", {1: "a"}),
        ("base_model_name_or_path", 4),
        ("revision", True),
        ("inference_mode", "no"),
        ("peft_version", 0.21),
        ("projection_source", "numpy"),
        ("unknown", None),
        ("unknown", {"r": 4}),
        ("unknown", {"peft_type": "LORA"}),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: expected .* found "):
        RandLoraConfig(**{field: value})


def test_bases_that_nothing_could_draw_again_are_saved() -> None:
    for source in ("jax", "file"):
        with pytest.raises(ConfigError, match=r"Keep save_projection=True, or .*'torch:"):
            RandLoraConfig(save_projection=False, projection_source=source)
    assert not RandLoraConfig(save_projection=False, projection_source="torch").save_projection


def test_a_file_says_where_its_bases_come_from() -> None:
    file = {"peft_type": "RANDLORA"}
    assert RandLoraConfig.from_dict(file).projection_source == "file"
    assert RandLoraConfig.from_dict(file | {"save_projection": False}).projection_source == "torch"


def test_hashable_frozen_and_replaceable() -> None:
    config = RandLoraConfig(
        **FULL, unknown={"new": {"nested": [1, {"deep": None}]}}, projection_source="file"
    )
    with pytest.warns(UserWarning, match="new"):
        copy = RandLoraConfig.from_dict(config.to_dict())
    assert copy == config
    assert hash(copy) == hash(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config != dataclasses.replace(config, r=8)
    assert config != dataclasses.replace(config, unknown={"new": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.unknown["new"] = 3  # type: ignore[index]


def test_collections_become_tuples() -> None:
    config = RandLoraConfig(target_modules={"v", "q"}, layers_to_transform={10, 2})
    assert config.target_modules == ("q", "v")
    assert config.layers_to_transform == (2, 10)
    assert RandLoraConfig(target_modules=["v", "q", "v"]).target_modules == ("v", "q")
    assert RandLoraConfig(target_modules="All-Linear").target_modules == "all-linear"
    assert type(RandLoraConfig(r=np.int64(4)).r) is int  # type: ignore[arg-type]


def test_scaling_and_kind() -> None:
    assert RandLoraConfig().scaling == 20
    assert RandLoraConfig(r=8, randlora_alpha=4).scaling == 0.5
    assert RandLoraConfig().kind == "dense"
    assert RandLoraConfig(sparse=True).kind == "sparse"
    assert RandLoraConfig(sparse=True, very_sparse=True).kind == "very_sparse"  # as in PEFT


def test_ignored_layer_fields_are_reported() -> None:
    with pytest.warns(UserWarning, match="layers_pattern is ignored") as caught:
        RandLoraConfig(layers_pattern="h")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="layers_to_transform is ignored") as caught:
        config = RandLoraConfig(layers_to_transform=0, target_modules=".*q")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="layers_to_transform is ignored") as caught:
        dataclasses.replace(config, r=8)
    assert caught[0].filename == __file__


def test_unknown_fields_are_kept_and_reported_once(tmp_path: Path) -> None:
    write(tmp_path, new_option={"a": [1, 2.5, None]}, other=True)
    with pytest.warns(UserWarning, match="unknown fields 'new_option', 'other': kept") as caught:
        config = RandLoraConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / CONFIG_NAME).read_text())
    assert written["new_option"] == {"a": [1, 2.5, None]}
    assert written["other"] is True
    assert "unknown" not in written
    assert "projection_source" not in written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"r": 4, "r": 8}', "'r' is given twice"),
        ('{"a": {"r": 4, "r": 8}}', "'r' is given twice"),
        ('{"randlora_alpha": NaN}', "found NaN"),
        ('{"randlora_alpha": -Infinity}', "found -Infinity"),
        ('{"randlora_alpha": 1e999}', "found 1e999"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
        ('{"r": ' + "1" * 5000 + "}", "not valid JSON"),
    ],
)
def test_broken_json_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(AdapterFileError, match=message) as caught:
        RandLoraConfig.from_pretrained(tmp_path)
    assert str(tmp_path / CONFIG_NAME) in str(caught.value)


def test_missing_or_unreadable_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="No such file"):
        RandLoraConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(b'{"revision": "\xff"}')
    with pytest.raises(AdapterFileError, match="UTF-8"):
        RandLoraConfig.from_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="expected a directory"):
        RandLoraConfig().save_pretrained(tmp_path / CONFIG_NAME)


@pytest.mark.parametrize("method", ["LORA", None, 3])
def test_another_methods_file_is_refused(method: Any, tmp_path: Path) -> None:
    write(tmp_path, peft_type=method)
    with pytest.raises(ConfigError, match=r"adapter_config.json: peft_type: expected 'RANDLORA'"):
        RandLoraConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="peft_type"):
        RandLoraConfig.from_dict({"r": 4})


def test_a_wrong_field_in_a_file_names_both(tmp_path: Path) -> None:
    write(tmp_path, r=32.0)
    with pytest.raises(ConfigError, match=r"adapter_config.json: r: expected .* found 32.0"):
        RandLoraConfig.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RandLoraConfig(r=4).save_pretrained(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk gone"):
        RandLoraConfig(r=8).save_pretrained(tmp_path)
    assert RandLoraConfig.from_pretrained(tmp_path).r == 4
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG_NAME]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    RandLoraConfig().save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / CONFIG_NAME).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("given", "right"),
    {
        "rank": "'r'",
        "lora_alpha": "'randlora_alpha'",
        "alpha": "'randlora_alpha'",
        "dropout": "'randlora_dropout'",
        "lora_dropout": "'randlora_dropout'",
        "targets": "'target_modules'",
        "target_module": "'target_modules'",
        "Target-Modules": "'target_modules'",
        "randlora_alfa": "'randlora_alpha'",
        "R": "'r'",
        "seed": "'projection_prng_key'",
        "init_lora_weights": "'init_weights'",
        "exclude_modules": "target_modules",
        "peft_type": "from_dict",
    }.items(),
)
def test_a_field_that_does_not_exist_is_answered_with_the_right_one(given: str, right: str) -> None:
    for make in (RandLoraConfig, partial(dataclasses.replace, RandLoraConfig())):
        with pytest.raises(ConfigError, match=f"there is no field '{given}'") as caught:
            make(**{given: 8})
        assert right in str(caught.value).split(given, 1)[1]


@pytest.mark.parametrize("given", [8, {"r": 8}, None])
def test_settings_are_given_by_keyword(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"by keyword.*RandLoraConfig\(\*\*settings\)"):
        RandLoraConfig(given)  # type: ignore[misc]


def test_a_class_that_teaches_is_a_dataclass_still() -> None:
    parameters = inspect.signature(RandLoraConfig).parameters
    assert list(parameters) == [item.name for item in dataclasses.fields(RandLoraConfig)]
    config = RandLoraConfig(r=4, target_modules=["q"])
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(RandLoraConfig):
        more: int = 0

        def __post_init__(self) -> None:
            """Checks nothing."""

    assert Mine(r=4, more=2).more == 2


@pytest.mark.parametrize(
    "targets",
    ["all_linear", "all linear", "All_Linear", "alllinear", ["all-linear"], ["ALL-LINEAR"]],
)
def test_all_linear_misspelt_is_answered(targets: Any) -> None:
    with pytest.raises(ConfigError, match="Write 'all-linear'") as caught:
        RandLoraConfig(target_modules=targets)
    assert repr(targets if isinstance(targets, str) else targets[0]) in str(caught.value)


def test_what_only_looks_like_all_linear_is_taken() -> None:
    assert RandLoraConfig(target_modules="ALL-LINEAR").target_modules == "all-linear"
    for targets in ("all|linear", "(all|linear)", "all.linear"):
        assert RandLoraConfig(target_modules=targets).target_modules == targets
    assert RandLoraConfig(target_modules=["all_linear"]).target_modules == ("all_linear",)
