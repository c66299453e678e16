"""A call in a thread of its own, beside the training."""

import atexit
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
SECONDS_AT_EXIT = 10.0


class Background(Generic[T]):
    """Runs `action` from now on; what it returned or raised is had by `result`.

    The thread does not keep the process alive: where one ends before, say in an error, the call is
    given a little time to end too. One that is cut off while the interpreter clears itself away
    could abort the process, whose exit code would then say something else.
    """

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self._action = action
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._wait_a_little)

    @property
    def running(self) -> bool:
        """Whether `result` would wait."""
        return self._thread.is_alive()

    def result(self) -> T:
        """Wait for the end."""
        self._thread.join()
        atexit.unregister(self._wait_a_little)
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome.append(self._action())
        except BaseException as error:
            self._error = error

    def _wait_a_little(self) -> None:
        self._thread.join(SECONDS_AT_EXIT)
