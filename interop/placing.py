"""One file in another's place: whole, of the same mode, through no link, whenever Ctrl-C comes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from errno import EBADF, EEXIST, EINVAL, ENOSYS, ENOTSUP
from pathlib import Path
from stat import S_IMODE, S_ISREG
from types import FrameType


@contextmanager
def replacing_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give the path of a new file to write, which takes `path`'s place on leaving.

    A reader, or a crash, meets the old file or the new one. A link at `path` is replaced and not
    followed. If the block raises, all stays as it was.

    Raises:
      FileExistsError: there is something at `path` by then, and `overwrite` is not set.
    """
    new = path.with_name(f".{secrets.token_hex(8)}.randlora-saving")
    try:
        yield new
        sync(new)
        if overwrite:
            take_mode(new, path)
            os.replace(new, path)
        else:
            _add(new, path)
    finally:
        new.unlink(missing_ok=True)


def take_mode(new: Path, old: Path) -> None:
    """Give a file the mode, and if we may the owner, of the regular file it will replace."""
    try:
        status = old.lstat()
    except FileNotFoundError:
        return
    if not S_ISREG(status.st_mode):
        return
    now = new.stat()
    if (now.st_uid, now.st_gid) != (status.st_uid, status.st_gid):
        with suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    set_mode(new, status.st_mode & 0o777)


def set_mode(path: Path, mode: int) -> None:
    """Change a mode where it is another; not every filesystem has modes to change."""
    if S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def _add(new: Path, path: Path) -> None:
    """Move a file to where none is; FileExistsError where one appeared."""
    try:
        os.link(new, path)
    except OSError as error:
        if os.path.lexists(path):
            raise FileExistsError(EEXIST, "there is such a file by now", str(path)) from error
        os.replace(new, path)  # a filesystem without hard links


def remove(path: Path) -> None:
    """Delete what is there, if anything: a folder with all in it, of a link the link alone.

    All names are gone at once. To give back the room of gigabytes takes a second more; while files
    are held open it waits, and Ctrl-C need not wait for it.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    held = ExitStack()
    for file in path.rglob("*"):
        if os.name != "nt" and file.is_file() and not file.is_symlink():
            with suppress(OSError):
                held.callback(os.close, os.open(file, os.O_RDONLY))
    shutil.rmtree(path, ignore_errors=True)
    threading.Thread(target=held.close, daemon=True).start()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, which takes moments.

    A handler runs in the main thread alone, and only there is one to be held back.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk, so that power loss keeps the order.

    For gigabytes that takes seconds, and Ctrl-C ends the waiting: hence a thread.
    """
    if os.name == "nt" and path.is_dir():
        return
    done: Future[None] = Future()
    threading.Thread(target=_flush, args=(path, done), daemon=True).start()
    done.result()


# What filesystems answer that sync no directory, such as folders shared with a virtual machine.
_NO_SYNC = (EBADF, EINVAL, ENOSYS, ENOTSUP)


def _flush(path: Path, done: Future[None]) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _NO_SYNC and path.is_dir():
            done.set_result(None)
        else:
            done.set_exception(error)
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)
