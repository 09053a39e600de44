"""Where commands write: nothing of others is lost, and what is replaced is said."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from peft_side import save_adapter, save_base
from randlora_jax.interop.atomic import replacing_files
from randlora_jax.interop.tensor_file import TensorFile

from randlora_jax.commands.compact import compact
from randlora_jax.commands.main import main
from randlora_jax.commands.merge import merge
from randlora_jax.commands.output import holds_a_model
from randlora_jax.commands.report import Misuse
from randlora_jax.commands.to_lora import to_lora

pytestmark = pytest.mark.torch

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
WRITES_ADAPTERS = ["compact", "convert", "to-lora"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A base model, an adapter, and rules for its names, that nobody changes."""
    folder = tmp_path_factory.mktemp("sources")
    save_base("llama", folder / "base")
    save_adapter("llama", folder / "base", folder / "adapter")
    (folder / "rules.json").write_text('{"model/(.*)": "net/\\\\1"}')
    return folder


def command(name, sources, out, *more, adapter=None):
    given = {
        "compact": [],
        "convert": ["--to", "torch", "--names", sources / "rules.json"],
        "to-lora": ["--base", sources / "base", "--rank", "2"],
        "merge": ["--base", sources / "base"],
    }[name]
    words = [name, adapter or sources / "adapter", *given, out, *more]
    return list(map(str, words))


def ask(capsys, *words):
    """A command's exit status and its report in JSON."""
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Directories of models.

WEIGHTS_OF_MODELS = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-q4.gguf",
    "model.onnx",
    "consolidated.00.pth",
]
NO_WEIGHTS = [
    "adapter_model.bin",
    "adapter_model.safetensors",
    "non_lora_trainables.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "tokenizer.json",
    "README.md",
]


@pytest.mark.parametrize("name", WRITES_ADAPTERS)
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_no_adapter_is_written_into_a_model(sources, tmp_path, capsys, name, force):
    model = tmp_path / "model"
    shutil.copytree(sources / "base", model)
    before = contents(model)
    status, report = ask(capsys, *command(name, sources, model, *force))
    assert status == 2 and not report["good"]
    assert "holds a model (config.json and model.safetensors)" in report["error"]
    assert contents(model) == before


def test_what_a_models_directory_is(tmp_path):
    for name in [*NO_WEIGHTS, *WEIGHTS_OF_MODELS]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("")
        assert not holds_a_model(folder)  # without config.json it is no model of transformers
        (folder / "config.json").write_text("{}")
        assert bool(holds_a_model(folder)) == (name in WEIGHTS_OF_MODELS), name
    assert not holds_a_model(tmp_path / "absent")


# What appears while a command works.


def meanwhile(monkeypatch, act):
    """Have something done once a command has opened the adapter."""
    read_header, done = TensorFile._read_header, []

    def act_and_read(file):
        if not done:
            done.append(act())
        return read_header(file)

    monkeypatch.setattr(TensorFile, "_read_header", act_and_read)


@pytest.mark.parametrize("name", [*WRITES_ADAPTERS, "merge"])
@pytest.mark.parametrize("old", ["no directory", "a file that stays"])
def test_what_appears_meanwhile_is_kept(sources, tmp_path, capsys, monkeypatch, name, old):
    out = tmp_path / "out"
    files = ["config.json", "model.safetensors"] if name == "merge" else ADAPTER_FILES
    if old != "no directory":
        out.mkdir()
        (out / "notes.txt").write_text("mine")

    def appear():
        out.mkdir(exist_ok=True)
        for file in files:
            (out / file).write_text("mine")

    meanwhile(monkeypatch, appear)
    status, report = ask(capsys, *command(name, sources, out))
    assert status == 2 and "--force" in report["error"]
    assert set(contents(out)) >= set(files) and set(contents(out).values()) == {b"mine"}
    assert not [*tmp_path.glob(".*"), *out.glob(".*")]


@pytest.mark.parametrize("name", [*WRITES_ADAPTERS, "merge"])
def test_another_kind_appears_meanwhile(sources, tmp_path, capsys, monkeypatch, name):
    """With --force, too: a model where an adapter is written, an adapter where a model is."""
    out = tmp_path / "out"
    files = ADAPTER_FILES if name == "merge" else ["config.json", "pytorch_model.bin"]

    def appear():
        out.mkdir()
        for file in files:
            (out / file).write_text("mine")

    meanwhile(monkeypatch, appear)
    status, report = ask(capsys, *command(name, sources, out, "--force"))
    assert status == 2 and "name another directory" in report["error"]
    assert contents(out) == dict.fromkeys(files, b"mine")


def test_merge_overwrites_no_other_files_either(sources, tmp_path, capsys):
    """Those that go along with a base model: its card, its tokenizer, configurations inside."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sources / "base", base)
    for name in ("README.md", "1_Pooling/config.json"):
        for folder, text in ((base, "theirs"), (out, "mine")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    words = ["merge", str(sources / "adapter"), "--base", str(base), str(out)]
    before = contents(out)
    status, report = ask(capsys, *words)
    assert status == 2 and "README.md exists" in report["error"] and contents(out) == before
    status, report = ask(capsys, *words, "--force")
    assert status == 0
    assert report["overwritten"] == ["1_Pooling/config.json", "README.md"]
    assert report["removed"] == []
    assert (out / "1_Pooling" / "config.json").read_text() == "theirs"


def test_merge_writes_through_no_link(sources, tmp_path, capsys):
    base, out, elsewhere = tmp_path / "base", tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(sources / "base", base)
    for folder in (base / "1_Pooling", elsewhere):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    shutil.copytree(sources / "base", out)
    (out / "1_Pooling").symlink_to(elsewhere)
    (out / ".config.json.randlora-ready").symlink_to(elsewhere)
    (out / ".config.json.randlora-saving").symlink_to(elsewhere)
    before = contents(out)
    words = ["merge", str(sources / "adapter"), "--base", str(base), str(out), "--force"]
    status, report = ask(capsys, *words)
    assert status == 2 and "1_Pooling is a link" in report["error"]
    assert contents(out) == before and contents(elsewhere) == {"config.json": b"elsewhere"}
    (out / "1_Pooling").unlink()
    assert main(words) == 0
    assert contents(elsewhere) == {"config.json": b"elsewhere"}
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("name", ["compact", "convert", "to-lora", "merge"])
def test_links_that_lead_in_a_circle_are_told(name, sources, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    status, report = ask(capsys, *command(name, sources, tmp_path / "out"))
    assert status == 2 and "Too many levels of symbolic links" in report["error"]
    with (
        pytest.raises(OSError, match="Too many levels"),
        replacing_files(tmp_path / "out", entry="config.json"),
    ):
        pass


# --force.


def test_force_removes_what_it_replaces_and_says_what(sources, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(sources / "base", out)
    goes = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "flax_model-00001-of-00002.msgpack",
        "tf_model.h5",
    ]
    stays = [
        "pytorch_model_notes.txt",
        "tf_model_readme.md",
        "flax_model.py",
        "model-backup.safetensors",
        "model.safetensors.bak",
        "model-1-of-2.safetensors",
        "notes.txt",
    ]
    for name in goes + stays:
        (out / name).write_text("mine")
    (out / "pytorch_model").mkdir()
    (out / "pytorch_model" / "data").write_text("mine")
    assert main(command("merge", sources, out)) == 2
    capsys.readouterr()
    status, report = ask(capsys, *command("merge", sources, out, "--force"))
    assert status == 0
    assert report["removed"] == sorted(goes)
    assert report["overwritten"] == sorted(path.name for path in (sources / "base").iterdir())
    left = contents(out)
    assert set(left) == {*report["overwritten"], *stays, "pytorch_model/data"}
    assert {left[name] for name in stays} == {b"mine"}

    for name in goes:
        (out / name).write_text("mine")
    assert main(command("merge", sources, out, "--force")) == 0
    said = capsys.readouterr().out
    assert f"removed in {out}: {', '.join(sorted(goes))}" in said
    assert f"overwritten in {out}: config.json, " in said


@pytest.mark.parametrize("name", WRITES_ADAPTERS)
def test_adapters_say_what_they_replace(sources, tmp_path, capsys, name):
    out = tmp_path / "out"
    status, report = ask(capsys, *command(name, sources, out))
    assert status == 0 and report["overwritten"] == report["removed"] == []
    (out / "adapter_model.bin").write_text("mine")
    for file in ADAPTER_FILES:
        (out / file).chmod(0o600)
    status, report = ask(capsys, *command(name, sources, out, "--force"))
    assert status == 0
    assert report["overwritten"] == ADAPTER_FILES and report["removed"] == []
    assert (out / "adapter_model.bin").read_text() == "mine"
    assert {stat.S_IMODE((out / file).stat().st_mode) for file in ADAPTER_FILES} == {0o600}
    assert main(command(name, sources, out, "--force")) == 0
    assert f"overwritten in {out}: {', '.join(ADAPTER_FILES)}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*WRITES_ADAPTERS, "merge"])
def test_a_folder_from_elsewhere_decides_nothing(sources, tmp_path, capsys, name):
    adapter, elsewhere, expected = (tmp_path / x for x in ("adapter", "elsewhere", "expected"))
    assert main(command(name, sources, expected)) == 0
    shutil.copytree(sources / "adapter", adapter)
    other = {"base": sources / "base", "folder": elsewhere, "projection_prng_key": 9}
    save_adapter("llama", **other)
    before = contents(elsewhere)
    ready = adapter / ".adapter_config.json.randlora-ready"
    shutil.copytree(elsewhere, ready)
    assert main(command(name, sources, tmp_path / "one", adapter=adapter)) == 0
    shutil.rmtree(ready)
    ready.symlink_to(elsewhere)
    assert main(command(name, sources, tmp_path / "two", adapter=adapter)) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(expected)
    assert contents(elsewhere) == before
    if name == "compact":  # in place
        assert main(command(name, sources, adapter, "--force", adapter=adapter)) == 0
        assert contents(elsewhere) == before and not list(adapter.glob(".*"))


# Names.


@pytest.mark.parametrize("name", [*WRITES_ADAPTERS, "merge"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_misuse(sources, tmp_path, capsys, monkeypatch, name, empty):
    monkeypatch.chdir(tmp_path)
    status, report = ask(capsys, *command(name, sources, empty, "--force"))
    assert status == 2 and "expected a name, found" in report["error"]
    assert not os.listdir(tmp_path)


def test_an_empty_name_is_misuse_in_python(sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter, base = sources / "adapter", sources / "base"
    for call in (
        lambda: compact(adapter, ""),
        lambda: merge(adapter, base=base, out=""),
        lambda: to_lora(adapter, base=base, out="", choose=lambda shares: 1),
    ):
        with pytest.raises(Misuse, match="expected a directory to write to, found ''"):
            call()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("option", ["DIR", "--base", "--plot"])
def test_an_empty_name_is_nothing_to_read(sources, tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(sources / "adapter")  # where an empty name would lead
    words = {"DIR": sources / "adapter", "--base": sources / "base", "--plot": tmp_path / "x.png"}
    words[option] = ""
    given = ["inspect", words.pop("DIR"), *(word for pair in words.items() for word in pair)]
    status, report = ask(capsys, *map(str, given))
    assert status == 2 and "expected a name, found ''" in report["error"]


# Pictures.


def test_a_picture_is_written_whole_or_not_at_all(sources, tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    picture = tmp_path / "norms.png"
    picture.write_bytes(b"earlier")
    picture.chmod(0o600)
    words = ["inspect", sources / "adapter", "--base", sources / "base", "--plot", picture]
    words = list(map(str, words))
    savefig = Figure.savefig

    def fail(figure, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    status, report = ask(capsys, *words, "--force")
    assert status == 2 and "No space left" in report["error"]
    assert contents(tmp_path) == {"norms.png": b"earlier"}

    def late(figure, path, **options):
        savefig(figure, path, **options)
        picture.write_bytes(b"mine")

    picture.unlink()
    monkeypatch.setattr(Figure, "savefig", late)
    status, report = ask(capsys, *words)
    assert status == 2 and "--force" in report["error"]
    assert contents(tmp_path) == {"norms.png": b"mine"}

    monkeypatch.setattr(Figure, "savefig", savefig)
    picture.chmod(0o600)
    assert main([*words, "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert main([*words[:-1], str(tmp_path / "absent" / "x.png")]) == 2
    assert "there is no directory" in capsys.readouterr().err
