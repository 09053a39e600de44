"""What lies in a directory already: hidden folders, links, modes, files of others."""

import errno
import hashlib
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest
from doomed import adapter_of, refuse_exchange, save_interrupted
from randlora_jax.interop import atomic
from randlora_jax.interop.atomic import Replaced, replacing_files
from randlora_jax.interop.config import CONFIG_NAME, RandLoraConfig
from randlora_jax.interop.errors import AdapterFileError, RandLoraError
from randlora_jax.interop.hub import local_directory
from randlora_jax.interop.peft_dir import WEIGHTS_NAME, read_adapter, write_adapter
from randlora_jax.interop.placing import replacing_file, uninterrupted

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["randlora_jax.interop.peft_dir"])
READY = f".{CONFIG_NAME}.randlora-ready"
SAVING = f".{CONFIG_NAME}.randlora-saving"


def version(directory: Path) -> int:
    return int(read_adapter(directory).config.randlora_alpha)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hidden(folder: Path) -> list[Path]:
    return [*folder.parent.glob(".*"), *folder.rglob(".*")]


@pytest.fixture
def elsewhere(tmp_path):
    """Another directory of the user's, with an adapter and more; it must stay as it is."""
    folder = tmp_path / "elsewhere"
    write_adapter(folder, adapter_of(7))
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text("mine")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture(params=["exchange", "in place"])
def way(request, monkeypatch):
    """Both ways in which files are put in place."""
    if request.param == "in place":
        monkeypatch.setattr(atomic, "_exchange", refuse_exchange)
    return request.param


# Hidden entries.


def test_files_that_one_sees_count(tmp_path, elsewhere):
    write_adapter(tmp_path / "a", adapter_of(1))
    write_adapter(tmp_path / "a" / READY, adapter_of(2))
    assert version(tmp_path / "a") == 1
    write_adapter(tmp_path / "a", adapter_of(3))
    assert version(tmp_path / "a") == 3
    assert not hidden(tmp_path / "a")


def test_what_a_crash_left_counts(tmp_path):
    write_adapter(tmp_path / "a", adapter_of(1))
    write_adapter(tmp_path / "a" / READY, adapter_of(2))
    (tmp_path / "a" / CONFIG_NAME).unlink()
    assert version(tmp_path / "a") == 2
    with pytest.raises(RuntimeError), replacing_files(tmp_path / "a", entry=CONFIG_NAME):
        raise RuntimeError  # a save that fails has finished the other before
    assert version(tmp_path / "a") == 2 and not hidden(tmp_path / "a")


def a_link(folder: Path, elsewhere: Path) -> None:
    (folder / READY).symlink_to(elsewhere)


def a_link_to_the_entry(folder: Path, elsewhere: Path) -> None:
    write_adapter(folder / READY, adapter_of(2))
    (folder / READY / CONFIG_NAME).unlink()
    (folder / READY / CONFIG_NAME).symlink_to(elsewhere / CONFIG_NAME)


def a_link_beside_the_entry(folder: Path, elsewhere: Path) -> None:
    write_adapter(folder / READY, adapter_of(2))
    (folder / READY / "notes").symlink_to(elsewhere / "sub" / "data")


def a_linked_folder(folder: Path, elsewhere: Path) -> None:
    write_adapter(folder / READY, adapter_of(2))
    (folder / READY / "sub").symlink_to(elsewhere / "sub")


def a_pipe(folder: Path, elsewhere: Path) -> None:
    write_adapter(folder / READY, adapter_of(2))
    os.mkfifo(folder / READY / "pipe")


def a_file(folder: Path, elsewhere: Path) -> None:
    (folder / READY).write_text("")


HOSTILE = [
    a_link,
    a_link_to_the_entry,
    a_link_beside_the_entry,
    a_linked_folder,
    a_pipe,
    a_file,
]


@pytest.mark.parametrize("hide", HOSTILE)
@pytest.mark.parametrize("complete", [True, False])
def test_a_hidden_link_leads_nowhere(tmp_path, elsewhere, hide, complete):
    folder = tmp_path / "a"
    write_adapter(folder, adapter_of(1))
    hide(folder, elsewhere)
    if complete:
        assert version(folder) == 1
    else:
        (folder / CONFIG_NAME).unlink()
        with pytest.raises(AdapterFileError, match=rf"found no {CONFIG_NAME}"):
            read_adapter(folder)
    write_adapter(folder, adapter_of(3))
    assert version(folder) == 3
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("make", [Path.symlink_to, lambda path, target: path.write_text("")])
def test_temporary_names_that_are_taken(tmp_path, elsewhere, way, make):
    folder = tmp_path / "a"
    write_adapter(folder, adapter_of(1))
    make(folder / SAVING, elsewhere)
    make(tmp_path / ".a.randlora-saving", elsewhere)
    write_adapter(folder, adapter_of(2))
    assert version(folder) == 2 and not hidden(folder)


# Links and folders where files have to be.


def test_a_linked_file_is_replaced_not_written(tmp_path, elsewhere, way):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).symlink_to(elsewhere / name)
    assert version(folder) == 7  # as the hub's cache has them
    write_adapter(folder, adapter_of(2))
    assert version(folder) == 2
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_hard_link_keeps_what_it_had(tmp_path, elsewhere, way):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        os.link(elsewhere / name, folder / name)
    write_adapter(folder, adapter_of(2))
    assert version(folder) == 2


def test_a_linked_directory_is_followed(tmp_path, way):
    write_adapter(tmp_path / "real", adapter_of(1))
    (tmp_path / "alias").symlink_to("real")
    write_adapter(tmp_path / "alias", adapter_of(2))
    assert (tmp_path / "alias").is_symlink() and version(tmp_path / "real") == 2


IN_THE_WAY = {
    "a link": lambda folder, elsewhere: (folder / "sub").symlink_to(elsewhere / "sub"),
    "a link to nowhere": lambda folder, elsewhere: (folder / "sub").symlink_to("nowhere"),
    "a file": lambda folder, elsewhere: (folder / "sub").write_text("mine"),
    "a folder": lambda folder, elsewhere: (folder / "sub" / "new").mkdir(parents=True),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("old", [True, False])
def test_what_stands_in_the_way_is_named(tmp_path, elsewhere, way, what, old):
    folder = tmp_path / "a"
    folder.mkdir()
    if old:
        (folder / "entry").write_text("old")
    IN_THE_WAY[what](folder, elsewhere)
    before = sorted(folder.rglob("*")), contents(folder)
    with (
        pytest.raises(RandLoraError, match=f"sub.* is a {what.split()[1]} .*sub/new"),
        replacing_files(folder, entry="entry") as staged,
    ):
        (staged / "sub").mkdir()
        for name in ("entry", "sub/new"):
            (staged / name).write_text("new")
    assert (sorted(folder.rglob("*")), contents(folder)) == before
    assert not (elsewhere / "sub" / "new").exists()


def test_what_a_crash_left_goes_through_no_link(tmp_path, elsewhere):
    folder = tmp_path / "a"
    write_adapter(folder / READY, adapter_of(2))
    (folder / READY / "sub").mkdir()
    (folder / READY / "sub" / "data").write_text("theirs")
    (folder / "sub").symlink_to(elsewhere / "sub")
    with pytest.raises(RandLoraError, match="is a link"):
        write_adapter(folder, adapter_of(3))


# Modes.


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_replaced_files_keep_their_modes(tmp_path, way, usual_umask):
    folder = tmp_path / "a"
    write_adapter(folder, adapter_of(1))
    folder.chmod(0o750)
    private = {CONFIG_NAME: 0o640, WEIGHTS_NAME: 0o600}
    for name, mode in private.items():
        (folder / name).chmod(mode)
    write_adapter(folder, adapter_of(2))
    assert version(folder) == 2 and modes(folder) == private
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    RandLoraConfig().save_pretrained(folder)
    assert modes(folder) == private


def test_a_new_name_tells_no_secrets(tmp_path, way, usual_umask):
    """One file of a private model becomes two."""
    (tmp_path / "entry").write_text("old")
    (tmp_path / "weights").write_text("old")
    (tmp_path / "weights").chmod(0o600)
    with replacing_files(tmp_path, entry="entry", obsolete=["weights*"]) as staged:
        assert stat.S_IMODE(staged.stat().st_mode) == 0o700
        for name in ("entry", "weights-1", "weights-2"):
            (staged / name).write_text("new")
    assert modes(tmp_path) == {"entry": 0o644, "weights-1": 0o600, "weights-2": 0o600}


def test_new_files_have_the_usual_mode(tmp_path, usual_umask):
    write_adapter(tmp_path / "a", adapter_of(1))
    assert set(modes(tmp_path / "a").values()) == {0o644}


# Asked again under the lock.


def test_what_will_be_replaced_is_told_before(tmp_path, way):
    names = ("entry", "weights", "weights.d", "other")
    (tmp_path / "weights.d").mkdir()
    for name in names:
        if name != "weights.d":
            (tmp_path / name).write_text("old")
    before, told = contents(tmp_path), []

    def refuse(replaced: Replaced) -> None:
        with pytest.raises(RandLoraError, match="another process is saving"):
            write_adapter(tmp_path, adapter_of(1))
        told.append(replaced)
        raise RuntimeError

    def save(allow) -> None:
        patterns = ["weights*"]
        with replacing_files(tmp_path, entry="entry", obsolete=patterns, allow=allow) as staged:
            (staged / "entry").write_text("new")
            (staged / "more").write_text("new")

    with pytest.raises(RuntimeError):
        save(refuse)
    assert contents(tmp_path) == before
    save(told.append)
    assert told == [Replaced(("entry",), ("weights",))] * 2
    assert contents(tmp_path) == {"entry": b"new", "more": b"new", "other": b"old"}
    assert (tmp_path / "weights.d").is_dir()  # no file, whatever its name


def test_a_refusal_leaves_no_new_folders(tmp_path):
    (tmp_path / "a").mkdir()
    deep = tmp_path / "a" / "b" / "c"
    with pytest.raises(RuntimeError), replacing_files(deep, entry="entry"):
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a"]


# One file.


def test_one_file_is_written_whole_or_not_at_all(tmp_path, elsewhere):
    path = tmp_path / "file"
    for overwrite in (True, False):
        with pytest.raises(RuntimeError), replacing_file(path, overwrite=overwrite) as new:
            new.write_text("half")
            raise RuntimeError
        assert not path.exists()
    with replacing_file(path, overwrite=False) as new:
        new.write_text("one")
    with pytest.raises(FileExistsError), replacing_file(path, overwrite=False) as new:
        new.write_text("two")
    assert path.read_text() == "one"
    path.unlink()
    path.symlink_to(elsewhere / CONFIG_NAME)
    with replacing_file(path) as new:
        new.write_text("three")
    assert path.read_text() == "three" and not path.is_symlink()
    assert sorted(tmp_path.iterdir()) == [elsewhere, path]


def test_no_hard_links_and_it_is_not_overwritten_either(tmp_path, monkeypatch):
    def refuse(one, other):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    with replacing_file(path, overwrite=False) as new:
        new.write_text("one")
    with pytest.raises(FileExistsError), replacing_file(path, overwrite=False) as new:
        new.write_text("two")
    assert path.read_text() == "one" and not hidden(tmp_path / "x")


# Ctrl-C.


@pytest.mark.parametrize("old", [None, 1])
def test_interrupted_at_every_file_operation(tmp_path, way, old):
    """All is old or all is new, and nothing is left over."""
    (tmp_path / "steps").mkdir()
    args = tmp_path / "steps", old, way == "in place"
    process = PROCESSES.Process(target=save_interrupted, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0
    outcomes = []
    for step in range(1 + max(int(path.name) for path in (tmp_path / "steps").iterdir())):
        folder = tmp_path / "steps" / str(step) / "a"
        outcomes.append(version(folder) if (folder / CONFIG_NAME).exists() else None)
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert names == ({CONFIG_NAME, WEIGHTS_NAME} if outcomes[-1] else set()), step
        assert not list(folder.parent.glob(".*")), step
    assert len(outcomes) > 15 and outcomes[0] == old and outcomes[-1] == 2
    assert outcomes == sorted(outcomes, key=lambda found: found == 2), "went back to the old"


def test_an_interrupt_waits_for_the_end_of_a_block():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted(), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(1)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """Which, as one long call of C does, lets no KeyboardInterrupt through."""
    on_disk = []

    def slow(handle):
        os.kill(os.getpid(), signal.SIGINT)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000_000)
        on_disk.append(handle)

    write_adapter(tmp_path / "a", adapter_of(1))
    monkeypatch.setattr(os, "fsync", slow)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "a", adapter_of(2))
    assert not on_disk
    assert version(tmp_path / "a") == 1 and not hidden(tmp_path / "a")


def test_a_filesystem_that_syncs_no_directory(tmp_path, monkeypatch):
    """The data is on the disk all the same; of a file no such answer is taken."""
    real, refused = os.fsync, stat.S_ISDIR

    def fsync(handle):
        if refused(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for number in (1, 2):
        write_adapter(tmp_path / "a", adapter_of(number))
        assert version(tmp_path / "a") == number and not hidden(tmp_path / "a")
    refused = stat.S_ISREG
    with pytest.raises(OSError, match="Invalid argument"):
        write_adapter(tmp_path / "a", adapter_of(3))
    assert version(tmp_path / "a") == 2


# No name.


def test_an_empty_name_is_no_directory(tmp_path, monkeypatch):
    write_adapter(tmp_path, adapter_of(1))
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for call in (
        lambda: write_adapter("", adapter_of(2)),
        lambda: RandLoraConfig().save_pretrained(""),
        lambda: RandLoraConfig().save_pretrained("  "),
        lambda: local_directory(""),
    ):
        with pytest.raises(RandLoraError, match="expected a directory"):
            call()
    assert contents(tmp_path) == before
