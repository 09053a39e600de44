"""Which names an adapter can have, and where it is saved."""

from pathlib import Path

import pytest
from randlora_jax.interop.adapter_name import checked_name, saving_folder
from randlora_jax.interop.config import RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, ConfigError

IMPOSSIBLE = {
    "": "empty",
    ".": "'.' in it",
    "..": "'.' in it",
    "../x": "in it",
    "a.b": "'.' in it",
    "a/b": "'/' in it",
    "a\\b": "in it",
    "/a": "in it",
    " a": "spaces at its ends",
    "a\n": "cannot be printed",
    "a\x00b": "cannot be printed",
    "a\ud800": "cannot be printed",
    "__base__": "no adapter",
    "weight": "tensor names have already",
    "randlora_A": "tensor names have already",
    "a" * 201: "longer than 200 bytes",
    "ü" * 101: "longer than 200 bytes",
    None: "a NoneType",
    3: "a int",
    ("a",): "a tuple",
}


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=repr)
def test_what_cannot_be_a_name_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match="adapter name: expected a plain name") as caught:
        checked_name(name)
    assert IMPOSSIBLE[name] in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["default", "my-task_2", "a b", "0", "Überzug", "r", "x" * 200])
def test_usual_names_are_taken(name):
    assert checked_name(name) == name


def test_an_adapter_is_saved_to_the_root_or_to_a_folder_of_its_name(tmp_path):
    assert saving_folder(tmp_path) == tmp_path
    assert saving_folder(str(tmp_path), "default") == tmp_path
    assert saving_folder(tmp_path / "new", "task") == tmp_path / "new" / "task"
    assert saving_folder(Path()) == Path(".")


@pytest.mark.parametrize("directory", ["", " ", None, 3, b"folder", ["folder"], "a\0b"], ids=repr)
def test_what_is_no_path_is_refused(directory):
    with pytest.raises(AdapterFileError, match="expected a directory to save to"):
        saving_folder(directory)
    with pytest.raises(AdapterFileError, match="expected a directory, found"):
        RandLoraConfig.from_pretrained(directory)


def test_a_file_in_the_way_is_refused_by_name(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "task").write_text("mine")
    for directory, name, in_the_way in (
        (file, "default", file),
        (file / "deeper" / "still", "default", file),
        (tmp_path, "task", tmp_path / "task"),
    ):
        with pytest.raises(AdapterFileError, match="is a file") as caught:
            saving_folder(directory, name)
        assert str(in_the_way) in str(caught.value)
    with pytest.raises(AdapterFileError, match="is a file"):
        RandLoraConfig().save_pretrained(file)
    assert file.read_text() == "mine"
