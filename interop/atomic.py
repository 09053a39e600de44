"""Replace several files of a directory so that they are seen all old or all new, never mixed.

An adapter is two files, a model many, and no system call replaces two files at once. What can
be swapped at once is a directory with another (Linux's ``RENAME_EXCHANGE``). So the new files
are written apart, a twin of the directory is made from hard links to them and to whatever else
the directory holds, and the two change places in one instant. Killed at any moment, the process
leaves the complete old files or the complete new ones. What it can leave besides is a hidden
``.<name>.randlora-saving`` beside the directory, which the next save removes.

Where that cannot be done (no such call on this system or filesystem, a mount point, a parent
that is not ours to write, a process that works inside the directory and would lose it) or need
not be, since the directory holds nothing to replace, the files are moved into place instead:

1. they are written to ``.<entry>.randlora-saving`` inside the directory;
2. that folder is renamed to ``.<entry>.randlora-ready``: from here on the new files count, and
   readers that ask `current_file` are given them;
3. the old *entry* is removed, the file without which any reader finds nothing;
4. the new files are moved into place, the entry last.

Readers that know nothing of this find the complete old files, nothing between steps 3 and 4 (a
few renames), then the complete new ones. The next save finishes a move that was cut short.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from randlora_jax.interop.errors import RandLoraError

try:
    import fcntl
except ImportError:  # Windows: two writers at once are then not told apart
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing_files(
    directory: str | Path, *, entry: str, obsolete: Sequence[str] = ()
) -> Iterator[Path]:
    """Give an empty folder to write new files to, and put them all in place at once on leaving.

    The new files may lie in subfolders. Files of `directory` that are not written again stay, in
    subfolders too, except those at its top that an `obsolete` pattern names. If the block raises,
    `directory` stays as it was.

    Args:
      directory: made if missing; a symbolic link is followed.
      entry: the file without which a reader finds nothing in `directory`; the block must
        write it. Such as ``"adapter_config.json"``.
      obsolete: patterns (fnmatch) of files that belong to the old state and must go with it.

    Raises:
      RandLoraError: another process is saving to `directory`.
      OSError: as from any writing.
    """
    target = Path(directory).resolve()
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        _place(target, entry, obsolete)  # what an earlier save had ready when it was killed
        staged = target / f".{entry}.randlora-saving"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            for path in (staged / entry, *staged.rglob("*"), staged):
                _sync(path)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if is_new:
                with suppress(OSError):
                    target.rmdir()
            raise
        if (target / entry).exists() and _swap(target, staged, obsolete):
            return
        staged.rename(_ready(target, entry))
        _sync(target)
        _place(target, entry, obsolete)


def current_file(directory: Path, name: str, *, entry: str) -> Path:
    """Where a file of `directory` lies, also when a save was cut short while moving files."""
    ready = _ready(directory, entry) / name
    return ready if ready.exists() else directory / name


def _ready(directory: Path, entry: str) -> Path:
    return directory / f".{entry}.randlora-ready"


def _place(target: Path, entry: str, obsolete: Sequence[str]) -> None:
    """Move what is ready into place; safe to repeat after being cut short anywhere."""
    ready = _ready(target, entry)
    if not ready.is_dir():
        return
    new = _files(ready)
    if entry in new:
        (target / entry).unlink(missing_ok=True)
        _sync(target)
        for file in target.iterdir():
            if _is_obsolete(file.name, obsolete) and file.is_file():
                file.unlink()
        for name in new - {entry}:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready / name, target / name)
        _sync(target)
        os.replace(ready / entry, target / entry)
    shutil.rmtree(ready)
    _sync(target)


def _swap(target: Path, staged: Path, obsolete: Sequence[str]) -> bool:
    """Let a complete twin take the directory's place; False where that cannot be done."""
    if _works_inside(target) or target == target.parent:
        return False
    twin = target.with_name(f".{target.name}.randlora-saving")
    shutil.rmtree(twin, ignore_errors=True)
    new = _files(staged)
    replaced = {staged.name, *new}
    replaced.update(name for name in os.listdir(target) if _is_obsolete(name, obsolete))
    with ExitStack() as locks:
        try:
            _link_tree(target, twin, leave=replaced)
            for name in new:
                (twin / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(staged / name, twin / name)
                _sync((twin / name).parent)
            locks.enter_context(_locked(twin))  # the next writer will lock it as the directory
            _exchange(twin, target)
        except OSError:
            shutil.rmtree(twin, ignore_errors=True)
            return False
        _sync(target.parent)
        _rescue(twin, target, leave=replaced)
        shutil.rmtree(twin, ignore_errors=True)
    return True


def _exchange(one: Path, other: Path) -> None:
    """Let two paths of one filesystem change places in one instant."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if sys.platform != "linux" or rename is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange two directories")
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        raise OSError(ctypes.get_errno(), "the directories could not be exchanged", str(one))


def _files(folder: Path) -> set[str]:
    """The paths of all files in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _link_tree(source: Path, copy: Path, leave: Collection[str], within: str = "") -> None:
    """Make `copy` a directory like `source`, its files the same files by hard links.

    Args:
      leave: paths of files that are not linked.
      within: `source`'s own path, as `leave` counts paths.
    """
    if os.path.ismount(source):
        raise OSError(errno.EXDEV, "a mount point cannot be moved", str(source))
    copy.mkdir()
    for item in os.scandir(source):
        path = os.path.join(within, item.name)
        if path in leave:
            continue
        if item.is_dir(follow_symlinks=False):
            _link_tree(source / item.name, copy / item.name, leave, path)
        else:
            os.link(item.path, copy / item.name, follow_symlinks=False)
    status = source.stat()
    os.chown(copy, status.st_uid, status.st_gid)
    shutil.copystat(source, copy)
    _sync(copy)


def _rescue(old: Path, new: Path, leave: Collection[str], within: str = "") -> None:
    """Bring over what others wrote into the old directory while its twin was being made."""
    for item in os.scandir(old):
        there, path = new / item.name, os.path.join(within, item.name)
        if path in leave:
            continue
        if not os.path.lexists(there):
            os.rename(item.path, there)
        elif item.is_dir(follow_symlinks=False):
            _rescue(old / item.name, there, leave, path)
        elif item.stat(follow_symlinks=False).st_mtime_ns > there.lstat().st_mtime_ns:
            os.rename(item.path, there)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system gives back when the process ends."""
    if fcntl is None:
        yield
        return
    while True:
        handle = os.open(directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RandLoraError(
                    f"{directory}: another process is saving here; save from one process "
                    "only, or wait for the other"
                ) from None
            except OSError:  # a filesystem without locks
                pass
            if os.path.samestat(os.fstat(handle), directory.stat()):
                yield
                return
        finally:
            os.close(handle)


def _works_inside(directory: Path) -> bool:
    """Whether this process would find itself in a removed folder after a swap."""
    try:
        return Path.cwd().is_relative_to(directory)
    except OSError:
        return False


def _is_obsolete(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk, so that power loss keeps the order."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
