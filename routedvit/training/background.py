"""A call in a thread of its own, beside the training."""

import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
PREFIX = "background: "


class Background(Generic[T]):
    """Runs `action` from now on; what it returned or raised is had by `result`, once.

    The thread does not keep the process alive. One that is still running when the interpreter
    clears itself away may abort the process, see `is_any_running`.

    Neither the call nor what it refers to outlives its end: the garbage collector may be off. (A
    Future would keep an error, whose traceback refers to the caller; executors keep the process
    alive until all their calls have ended.)
    """

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self._action: Callable[[], T] | None = action
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=PREFIX + name, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether `result` would wait."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the end, but no longer than this."""
        self._thread.join(seconds)

    def result(self) -> T:
        """Wait for the end."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        return self._outcome.pop()

    def _run(self) -> None:
        assert self._action is not None
        try:
            self._outcome.append(self._action())
        except BaseException as error:
            error.add_note("".join(traceback.format_exception(error)))
            # Tracebacks refer to frames, and those to what was to be written.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._error = error
        finally:
            self._action = None


def is_any_running() -> bool:
    """Whether a call is running in this process."""
    return any(thread.name.startswith(PREFIX) for thread in threading.enumerate())
