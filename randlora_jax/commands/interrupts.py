"""Ctrl-C ends a command within a second, with one line and exit status 130, whatever it is doing.

While modules are imported there is nothing to clean up, and an exception that goes through half of
an import may come out as another: there the handler itself ends the process. Later it raises
KeyboardInterrupt as ever, and the files written so far are removed. Python raises it between two of
its own steps, though, and one call of a library can last: so a thread ends the process if that does
not end by itself. Files are put in place in a way that bears this at any moment (`interop.atomic`).
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from randlora_jax.commands.terminal import NotPrinted, put, tell, wants_json

INTERRUPTED = 130  # what a shell gives for SIGINT
GRACE = 0.6  # seconds


def tell_of_interrupt(arguments: Sequence[str]) -> int:
    """Say that a command was interrupted, and return its exit status."""
    tell("randlora-jax: interrupted")
    if wants_json(arguments):
        with suppress(NotPrinted):
            put('{\n  "good": false,\n  "error": "interrupted",\n  "warnings": []\n}')
    return INTERRUPTED


@contextmanager
def leaving_at_once(arguments: Sequence[str]) -> Iterator[None]:
    """Within the block Ctrl-C ends the process on the spot; for work that leaves nothing behind."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or not _is_main_thread():  # a job in the background ignores it
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: _leave(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def leaving_soon(arguments: Sequence[str]) -> Iterator[threading.Event]:
    """Within the block Ctrl-C ends the process, if what it raises has not a moment later.

    Yields:
      what tells whether it came: libraries may turn KeyboardInterrupt into an error of theirs.
    """
    came, over = threading.Event(), threading.Event()
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or not _is_main_thread():
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        if not came.is_set():  # what cleans up after the first one is not interrupted again
            came.set()
            handler(number, frame)

    import socket  # by now there is one who answers Ctrl-C

    reading, writing = socket.socketpair()  # pipes block in Windows under Python 3.11
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno())  # every signal's number goes there at once

    def watch() -> None:
        while number := reading.recv(1):
            if number[0] == signal.SIGINT and not over.wait(GRACE):
                _leave(arguments)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, handler)
        over.set()
        signal.set_wakeup_fd(before)
        writing.close()
        thread.join()
        reading.close()
        # While Python ends, which also takes a moment, there is nothing left to be interrupted.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def _is_main_thread() -> bool:
    """Whether this is the thread in which Python calls what answers a signal."""
    return threading.current_thread() is threading.main_thread()


def _leave(arguments: Sequence[str]) -> None:
    # in a thread, since a reader who has stopped reading must not hold this up
    telling = threading.Thread(target=tell_of_interrupt, args=[arguments], daemon=True)
    telling.start()
    telling.join(0.2)
    os._exit(INTERRUPTED)
