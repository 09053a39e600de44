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
2. that folder is renamed to ``.<entry>.randlora-ready``;
3. the old *entry* is removed, the file without which any reader finds nothing: from here on the
   new files count, and readers that ask `current_file` are given them;
4. the new files are moved into place, the entry last.

Readers that know nothing of this find the complete old files, nothing between steps 3 and 4 (a
few renames), then the complete new ones. The next save finishes a move that was cut short.

A directory may come from elsewhere, hidden folders and links in it included. So a folder of these
names counts only as step 3 leaves it, the entry gone and nothing but regular files inside; and no
link is followed, but for the one that names the directory itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from stat import S_IMODE

from randlora_jax.interop.errors import RandLoraError
from randlora_jax.interop.placing import remove, set_mode, sync, take_mode, uninterrupted

try:
    import fcntl
except ImportError:  # Windows: two writers at once are then not told apart
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Replaced:
    """What of a directory makes room for new files, by paths in it.

    Attributes:
      overwritten: files that have a new one of their name.
      removed: files of the old state that have none.
    """

    overwritten: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.overwritten + self.removed


@contextmanager
def replacing_files(
    directory: str | Path,
    *,
    entry: str,
    obsolete: Sequence[str] = (),
    allow: Callable[[Replaced], object] = lambda replaced: None,
) -> Iterator[Path]:
    """Give an empty folder to write new files to, and put them all in place at once on leaving.

    The new files may lie in subfolders. Files of `directory` that are not written again stay, in
    subfolders too, except those at its top that an `obsolete` pattern names. If the block raises,
    `directory` stays as it was. Where one file takes another's place it takes its mode, and a file
    of a new name is readable by nobody who could not read all that makes room.

    Args:
      directory: made if missing; a symbolic link is followed.
      entry: the file without which a reader finds nothing in `directory`; the block must
        write it. Such as ``"adapter_config.json"``.
      obsolete: patterns (fnmatch) of files that belong to the old state and must go with it.
      allow: told what will be replaced, under the directory's lock, when all is written and
        nothing in place yet; if it raises, `directory` stays as it was.

    Raises:
      RandLoraError: another process is saving to `directory`, or a link or a folder stands where a
        file has to be.
      OSError: as from any writing.
    """
    target = _resolved(Path(directory))
    missing = [place for place in (target, *target.parents) if not place.exists()]
    staged = target / f".{entry}.randlora-saving"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _finish(target, entry, obsolete)
            try:
                remove(staged)
                staged.mkdir(mode=0o700)  # what it will replace may be private
                yield staged
                for path in (staged / entry, *staged.rglob("*"), staged):
                    sync(path)
                replaced = _check_places(target, staged, obsolete)
                allow(replaced)
                _take_modes(staged, target, replaced)
                if not ((target / entry).exists() and _swap(target, staged, obsolete)):
                    with uninterrupted():
                        staged.rename(_ready(target, entry))
                        _place(target, entry, obsolete)
            finally:
                remove(staged)
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _resolved(path: Path) -> Path:
    """What a path leads to.

    Raises:
      OSError: links lead in a circle. (pathlib raises another error for it, or none.)
    """
    if path.is_symlink():
        with suppress(FileNotFoundError):  # a link to nowhere is followed, and made there
            path.stat()
    return path.resolve()


def current_file(directory: Path, name: str, *, entry: str) -> Path:
    """Where a file of `directory` lies, also when a save was cut short while moving files."""
    ready = _ready(directory, entry)
    is_there = _was_cut_short(directory, entry) and (ready / name).exists()
    return ready / name if is_there else directory / name


# Moving files into place.


def _ready(directory: Path, entry: str) -> Path:
    return directory / f".{entry}.randlora-ready"


def _was_cut_short(directory: Path, entry: str) -> bool:
    """Whether a save ended while it moved files, so that those in its folder count."""
    ready = _ready(directory, entry)
    return (
        not os.path.lexists(directory / entry)
        and os.path.lexists(ready / entry)
        and not ready.is_symlink()
        and _is_plain(ready)
    )


def _is_plain(folder: str | Path) -> bool:
    """Whether a folder holds nothing but regular files and folders of such."""
    try:
        with os.scandir(folder) as items:
            return all(
                item.is_file(follow_symlinks=False)
                or (item.is_dir(follow_symlinks=False) and _is_plain(item.path))
                for item in items
            )
    except OSError:  # its owner has just put it in place
        return False


def _finish(target: Path, entry: str, obsolete: Sequence[str]) -> None:
    """Put in place what an earlier save had ready when it was killed, or drop what is not that."""
    if _was_cut_short(target, entry):
        with uninterrupted():
            _place(target, entry, obsolete)
    else:
        remove(_ready(target, entry))


def _place(target: Path, entry: str, obsolete: Sequence[str]) -> None:
    """Move what is ready into place; safe to repeat after being cut short anywhere."""
    ready = _ready(target, entry)
    replaced = _check_places(target, ready, obsolete)
    sync(target)
    (target / entry).unlink(missing_ok=True)
    sync(target)
    for name in replaced.removed:
        (target / name).unlink(missing_ok=True)
    for name in _files(ready) - {entry}:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(ready / name, target / name)
    sync(target)
    os.replace(ready / entry, target / entry)
    shutil.rmtree(ready)
    sync(target)


def _check_places(target: Path, new: Path, obsolete: Sequence[str]) -> Replaced:
    """What makes room for the files in folder `new`.

    Raises:
      RandLoraError: something else than a folder of `target` stands where a folder has to be, or a
        folder where a file.
    """
    names = _files(new)
    for name in sorted(names):
        within = [target / folder for folder in Path(name).parents if folder != Path()]
        blocked = [place for place in within if os.path.lexists(place) and not _is_folder(place)]
        blocked += [target / name] if _is_folder(target / name) else []
        if blocked:
            found = (
                "link" if blocked[0].is_symlink() else "folder" if blocked[0].is_dir() else "file"
            )
            raise RandLoraError(
                f"{blocked[0]} is a {found} and in the way of {name}, which would be written "
                "there; move it away, or name another directory"
            )
    with os.scandir(target) as items:
        old = {
            item.name
            for item in items
            if item.is_file() and any(fnmatch(item.name, pattern) for pattern in obsolete)
        }
    overwritten = (name for name in sorted(names) if os.path.lexists(target / name))
    return Replaced(tuple(overwritten), tuple(sorted(old - names)))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# Changing places.


def _swap(target: Path, staged: Path, obsolete: Sequence[str]) -> bool:
    """Let a complete twin take the directory's place; False where that cannot be done."""
    if _works_inside(target) or target == target.parent:
        return False
    twin = target.with_name(f".{target.name}.randlora-saving")
    new = _files(staged)
    replaced = {staged.name, *new, *_check_places(target, staged, obsolete).removed}
    with ExitStack() as held:
        try:
            remove(twin)
            _link_tree(target, twin, leave=replaced)
            for name in new:
                (twin / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(staged / name, twin / name)
                sync((twin / name).parent)
            held.enter_context(_locked(twin))  # the next writer will lock it as the directory
            held.enter_context(uninterrupted())
            _exchange(twin, target)
        except BaseException as error:
            shutil.rmtree(twin, ignore_errors=True)
            if isinstance(error, OSError):
                return False
            raise
        sync(target.parent)
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
    copy.mkdir(mode=0o700)  # until it has the mode of its source, which may be private
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
    sync(copy)


def _rescue(old: Path, new: Path, leave: Collection[str], within: str = "") -> None:
    """Bring over what others wrote into the old directory while its twin was being made."""
    for item in os.scandir(old):
        there, path = new / item.name, os.path.join(within, item.name)
        if path in leave:
            continue
        if not os.path.lexists(there):
            os.rename(item.path, there)
        elif item.is_dir(follow_symlinks=False):
            if not there.is_symlink():
                _rescue(old / item.name, there, leave, path)
        elif item.stat(follow_symlinks=False).st_mtime_ns > there.lstat().st_mtime_ns:
            os.rename(item.path, there)


# Modes and locks.


def _take_modes(staged: Path, target: Path, replaced: Replaced) -> None:
    """Give the new files the modes of the old ones, so that what was private stays so."""
    most = 0o777
    for name in replaced.names:
        with suppress(OSError):  # a link to nowhere
            most &= (target / name).stat().st_mode | 0o700
    for name in _files(staged):
        set_mode(staged / name, S_IMODE((staged / name).stat().st_mode) & most)
        take_mode(staged / name, target / name)
    set_mode(staged, S_IMODE(target.stat().st_mode) | 0o700)


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
