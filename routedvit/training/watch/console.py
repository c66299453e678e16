"""The console belongs to the run: everything else that is printed goes into a log file per rank.

DeepSpeed, torch, C++ libraries, compilers and worker processes all write to file descriptors 1 and
2, so these are pointed at the log and a duplicate of the real ones is kept for our own lines. That
catches what redirecting `sys.stdout` cannot: output of C++ and of child processes.

    with Console(rank, user_errors=(ConfigError, DataError)) as console:
        config = ...                                # chatter goes to a temporary file for now
        console.log_to(run_folder / "logs" / f"rank_{rank}.log")
        console.print("only rank 0 says this")
        progress = build_progress(rank, console.stream)

How it ends: a user error is one line and exit code 2 (or its `exit_code`); any other exception is
one line that points to the full traceback in the log, and exit code 1. Errors of ranks other than 0
are shown only if rank 0 has not ended the run meanwhile. The redirection outlives the `with` block
on purpose: interpreter shutdown is when libraries complain most. Without entering it, a Console is
transparent.

Standard library only, so that it can be in force before the slow, talkative imports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, TextIO

USER_ERROR_CODE = 2
CRASH_CODE = 1
INTERRUPT_CODE = 128 + signal.SIGINT


class Console:
    """The real console for our own lines, a log for all others.

    Args:
        rank: only rank 0 prints lines.
        user_errors: exceptions that the user can mend; their text is the whole message.
        grace_seconds: how long another rank than 0 waits before it shows its error. When all ranks
            meet the same mistake, rank 0 has shown it and the launcher has ended the others by
            then (DeepSpeed's looks once per second).
        explain: what to say of another exception instead of its type and text, or None.
        leave: ends the process with an exit code after an error, see distributed/parting.py.
    """

    def __init__(
        self,
        rank: int,
        *,
        user_errors: tuple[type[Exception], ...] = (),
        grace_seconds: float = 8.0,
        explain: Callable[[BaseException], str | None] = lambda error: None,
        leave: Callable[[int], NoReturn] = sys.exit,
    ) -> None:
        self.rank = rank
        self.stream: TextIO = sys.stdout
        self.log_path: Path | None = None
        self._user_errors = user_errors
        self._grace_seconds = grace_seconds
        self._explain = explain
        self._leave = leave
        self._errors: TextIO = sys.stderr
        self._pending: BinaryIO | None = None

    def __enter__(self) -> Console:
        _flush()
        self.stream = _stream(os.dup(1), sys.stdout)
        self._errors = _stream(os.dup(2), sys.stderr)
        sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)
        self._pending = tempfile.TemporaryFile()
        _redirect(self._pending.fileno())
        faulthandler.enable()  # a segmentation fault leaves its Python stack in the log
        return self

    def log_to(self, path: Path, command: str = "") -> None:
        """From now on the log is `path` (appended to), where `command` begins this start's part;
        what was caught so far goes there first.
        """
        self.log_path = path
        if self._pending is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        self._pending.seek(0)
        with path.open("ab", buffering=0) as log:
            with contextlib.suppress(OSError):  # a full disk
                title = f"=== {datetime.now():%Y-%m-%d %H:%M:%S}  {command}\n"
                log.write(title.encode())
                shutil.copyfileobj(self._pending, log)
            _redirect(log.fileno())
        self._pending.close()

    def print(self, text: str) -> None:
        """One of our own lines, shown by rank 0. While a bar runs, use `Progress.message`."""
        if self.rank == 0:
            print(text, file=self.stream, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _flush()
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            self.print("interrupted")
            self._leave(INTERRUPT_CODE)
        traceback.print_exception(kind, error, trace)  # into the log
        _flush()
        self._wait_for_rank_0()
        if isinstance(error, self._user_errors):
            self.show(f"error: {error}")
            self._leave(getattr(error, "exit_code", USER_ERROR_CODE))
        words = self._explain(error)
        if self.log_path is None:
            traceback.print_exception(kind, error, trace, file=self._errors)
            if words:
                self.show(f"crashed: {words}")
        else:
            first_line = (str(error).splitlines() or [""])[0]
            self.show(f"crashed: {words or f'{type(error).__name__}: {first_line}'}")
            self.show(f"the full traceback is at the end of {self.log_path}")
        self._leave(CRASH_CODE)

    def _wait_for_rank_0(self) -> None:
        if self.rank != 0:
            # The launcher ends us with SIGTERM, which the trainer may have turned into "save".
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(self._grace_seconds)

    def show(self, line: str) -> None:
        """A line of any rank, marked with its number; for what rank 0 may not know."""
        prefix = f"[rank {self.rank}] " if self.rank else ""
        print(prefix + line, file=self._errors, flush=True)


class _Forgiving(io.FileIO):
    """What a full disk or a closed pipe does not take is lost; the run is not, nor its exit code
    (where it cannot flush at its end, the interpreter exits with 120).
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _stream(descriptor: int, like: TextIO) -> TextIO:
    """A line-buffered text stream on `descriptor`, encoded as `like` is."""
    raw = io.BufferedWriter(_Forgiving(descriptor, "w", closefd=False))
    return io.TextIOWrapper(raw, like.encoding, errors="replace", line_buffering=True)


def _redirect(target: int) -> None:
    _flush()
    os.dup2(target, 1)
    os.dup2(target, 2)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
