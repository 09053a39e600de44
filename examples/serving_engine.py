"""Answers written side by side: whoever comes gets a row, and leaves it when the answer ends.

One thread does all the computing. It hands tokens to an event loop and never waits for those who
read them.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from serving_steps import Steps


class Full(Exception):
    """As many answers wait for a row as may."""


@dataclass(eq=False)
class Answer:
    """One that is being written, or waits for a row.

    Args:
      prompt: its tokens.
      slot: of its adapter.
      limit: how many tokens it may have, all of which fit into `said`, whoever reads them when.
      end: the token that ends it; None to go on to the limit.
      ended: called in the event loop once its row is free, and its adapter unused.
      gone: nobody wants it any more.
    """

    prompt: Sequence[int]
    slot: int
    limit: int
    end: int | None
    ended: Callable[[], None]
    said: asyncio.Queue[int | Exception | None] = field(default_factory=asyncio.Queue)
    gone: bool = False
    # of the engine's thread
    newest: int = 0
    count: int = 0

    async def tokens(self) -> AsyncIterator[int]:
        """Its tokens as they are said, without the one that ends it.

        Raises:
          RuntimeError: the engine broke down.
        """
        while (token := await self.said.get()) is not None:
            if isinstance(token, Exception):
                raise RuntimeError("the engine broke down") from token
            yield token


class Engine:
    """The thread that computes, and its rows.

    Args:
      loop: where answers are read.
      waiting: how many answers may wait for a row.
    """

    def __init__(self, steps: Steps, loop: asyncio.AbstractEventLoop, waiting: int) -> None:
        self.steps = steps
        self.rows: list[Answer | None] = [None] * steps.sizes.rows
        self.taken = 0  # steps, since it began
        self._loop, self._arriving = loop, queue.Queue[Answer | None](waiting)
        self._stopping, self._broken = False, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def ask(self, answer: Answer) -> None:
        """Has it written.

        Raises:
          Full: too many wait.
          RuntimeError: the engine broke down before.
        """
        if self._broken:
            raise RuntimeError("the engine broke down")
        try:
            self._arriving.put_nowait(answer)
        except queue.Full:
            raise Full(f"{self._arriving.maxsize} answers wait for a row already") from None

    @property
    def waiting(self) -> int:
        """How many wait for a row."""
        return self._arriving.qsize()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._stopping = True
        with contextlib.suppress(queue.Full):  # then it does not sleep
            self._arriving.put_nowait(None)
        self._thread.join()

    # In the thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._seat()
                self._step()
        except Exception as error:
            self._tell(self._give_up, error)
            raise

    def _give_up(self, error: Exception) -> None:
        """In the event loop, where `ask` is called, so that no answer comes in between."""
        self._broken = True
        answers = [answer for answer in self.rows if answer]
        while not self._arriving.empty():
            if answer := self._arriving.get_nowait():
                answers.append(answer)
        for answer in answers:
            answer.said.put_nowait(error)
            answer.ended()

    def _seat(self) -> None:
        """Reads prompts that wait into free rows, as many as one program takes."""
        free = [i for i, answer in enumerate(self.rows) if answer is None]
        most, new = min(len(free), self.steps.sizes.prompts[-1]), list[Answer]()
        while len(new) < most:
            sleep = len(free) == len(self.rows) and not new
            try:
                answer = self._arriving.get(block=sleep)
            except queue.Empty:
                break
            if answer is None:
                break
            if answer.gone:
                self._tell(answer.ended)
            else:
                new.append(answer)
        if not new:
            return
        rows = free[: len(new)]
        for row, answer in zip(rows, new, strict=True):
            self.rows[row] = answer
        prompts, slots = [answer.prompt for answer in new], [answer.slot for answer in new]
        said = self.steps.read(prompts, slots, rows)
        for row, answer, token in zip(rows, new, said, strict=True):
            answer.count = len(answer.prompt)
            self._say(row, answer, token)

    def _step(self) -> None:
        """One more token for each row."""
        for row, answer in enumerate(self.rows):
            if answer and answer.gone:
                self._leave(row, answer)
        busy = [row for row, answer in enumerate(self.rows) if answer]
        if not busy:
            return
        first = self.rows[: busy[-1] + 1]
        said = self.steps.step(
            [answer.newest if answer else 0 for answer in first],
            [answer.count if answer else 0 for answer in first],
            [answer.slot if answer else 0 for answer in first],
        )
        self.taken += 1
        for row, answer in enumerate(first):
            if answer:
                answer.count += 1
                self._say(row, answer, said[row])

    def _say(self, row: int, answer: Answer, token: int) -> None:
        answer.newest, answer.limit = token, answer.limit - 1
        if token != answer.end:
            self._tell(answer.said.put_nowait, token)
        if token == answer.end or not answer.limit:
            self._leave(row, answer)

    def _leave(self, row: int, answer: Answer) -> None:
        self.rows[row] = None
        self._tell(answer.said.put_nowait, None)
        self._tell(answer.ended)

    def _tell(self, what: Callable[..., None], *values: object) -> None:
        self._loop.call_soon_threadsafe(what, *values)
