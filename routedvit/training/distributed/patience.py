"""Ends a rank that waits in vain, in words: for peers that died, or for a step that never ends.

NCCL loses a rank in silence. Nothing is raised in the ranks that are left: they sit in a copy from
the device until torch's watchdog aborts the process from a thread of its own (SIGABRT, exit code
134), and a SIGTERM meanwhile only sets a flag that nobody comes to read. So a thread watches the
steps go by, half a minute less patient than the watchdog. It tells what this rank waits for and
since when, leaves the stacks of all threads in the rank's log, and ends the process.

What takes long by right must not be ended, and only the wait for others in a step is bounded:

- a step has the patience for a collective *and* the time that the step before it took;
- building and the first step of a start, which compiles, have no bound, nor has what is marked
  `busy`: saving, evaluating, going back. There only torch's watchdog guards each collective;
- gloo tells a lost rank and a wait in vain by itself, in a RuntimeError: no bound, see `limit`.

What another rank fails of (last_words.py) ends this one at any time, a little later than it would
end by itself where all meet the same error: whatever it does now, the next collective is in vain.

After a wish to stop a step has a minute more than the one before it took; `busy` has no bound there
either, for a save is what the wish is about. Before the first step has ended nothing is lost, and
the process ends as it does while it waits for the ranks to meet, with 75.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from routedvit.training.distributed.connection import place
from routedvit.training.distributed.last_words import LastWords
from routedvit.training.distributed.signals import REQUEUE_EXIT_CODE

MARGIN_SECONDS = 30.0  # before torch's watchdog would abort, time to say why
WISH_SECONDS = 60.0
FAULT_SECONDS = 10.0
GRACE_SECONDS = 8.0  # in which rank 0 speaks for all, as in watch/console.py
PACKAGE = Path(__file__).parents[2]


class Patience:
    """Within the `with` block a thread watches that steps end. A new one has no bound at all.

    Args:
        rank: of this process.
        limit: seconds that a step may wait beyond the time of the one before it; None: for ever.
        stop_wanted: whether this process was asked to stop; called by the thread.
        tell: called by the thread with one line before the process ends.
        last_words: of all ranks of the world, or None.
        fault_seconds: how long this rank goes on after those of another.
        wish_seconds: how long a step may go on after a wish to stop, likewise.
        grace_seconds: how long a rank other than 0 keeps its line back.
        poll_seconds: between two looks.
    """

    def __init__(
        self,
        rank: int = 0,
        *,
        limit: float | None = None,
        stop_wanted: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = print,
        last_words: LastWords | None = None,
        fault_seconds: float = FAULT_SECONDS,
        wish_seconds: float = WISH_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        poll_seconds: float = 1.0,
    ) -> None:
        self._rank = rank
        self._limit = limit
        self._stop_wanted = stop_wanted
        self._tell = tell
        self._last_words = last_words
        self._fault_seconds = fault_seconds
        self._wish_seconds = wish_seconds
        self._grace_seconds = grace_seconds
        self._poll_seconds = poll_seconds
        self._step: int | None = None  # the last that ended; None before the first of this start
        self._step_seconds = 0.0
        self._moved = time.monotonic()
        self._wished: float | None = None
        self._heard: float | None = None
        self._busy = 0
        self._main = threading.get_ident()
        self._over = threading.Event()

    def __enter__(self) -> "Patience":
        threading.Thread(target=self._watch, name="patience", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()  # how the process ends from here on is the console's affair
        if self._last_words is None:
            return
        self._last_words.close()
        if error is not None:
            first_line = (str(error).splitlines() or [""])[0]
            self._last_words.say(
                f"{place(self._rank)} failed: {type(error).__name__}: {first_line}"
            )

    def stepped(self, step: int) -> None:
        """Step `step` has ended on all ranks."""
        now = time.monotonic()
        self._step_seconds, self._moved = now - self._moved, now
        self._step = step

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around what may take as long as it takes. May be nested."""
        self._busy += 1
        try:
            yield
        finally:
            self._moved = time.monotonic()  # before the bound is back
            self._busy -= 1

    def _watch(self) -> None:
        while not self._over.wait(self._poll_seconds):
            if (end := self._ran_out()) and not self._over.is_set():
                self._leave(*end)

    def _ran_out(self) -> tuple[str, int] | None:
        """What to say and the exit code, once there is no more to wait for."""
        now = time.monotonic()
        if self._wished is None and self._stop_wanted():
            self._wished = now
        if self._last_words is not None and self._last_words.heard is not None:
            self._heard = self._heard or now
            if now - self._heard > self._fault_seconds:
                return f"{self._last_words.heard}; its own output and its log say more", 1
        if self._busy:
            return None
        waited, first = now - self._moved, self._step is None
        beyond = waited - (0.0 if first else self._step_seconds)
        if self._limit is not None and not first and beyond > self._limit:
            return self._words(waited, "another rank has died or hangs, and its output says why"), 1
        if self._wished is not None and min(beyond, now - self._wished) > self._wish_seconds:
            if first:
                words = "stopped before the first step; the same command starts it"
                return words, REQUEUE_EXIT_CODE
            return self._words(waited, "it was asked to stop, but this step does not end"), 1
        return None

    def _words(self, seconds: float, why: str) -> str:
        return (
            f"{place(self._rank)} has waited {seconds:.0f} s in {self._where()} since step "
            f"{self._step} ended: {why}; the stacks of this rank are in its log, and the same "
            "command goes on from the newest checkpoint"
        )

    def _where(self) -> str:
        """Where in our code the main thread is."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                return f"{frame.f_code.co_name} ({path.relative_to(PACKAGE)}:{frame.f_lineno})"
            frame = frame.f_back
        return "code that is not ours"

    def _leave(self, words: str, code: int) -> None:
        try:
            print(words, file=sys.stderr, flush=True)  # which is the rank's log
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            sys.stdout.flush()
            if self._rank:
                time.sleep(self._grace_seconds)
            self._tell(words)
        finally:  # also where the disk is full or the console is gone
            os._exit(code)


def bound_of_a_wait(timeout: float) -> float:
    """`limit` under NCCL: shortly before a collective of `timeout` seconds is given up."""
    return max(timeout - MARGIN_SECONDS, timeout / 2)
