"""SIGTERM and SIGUSR1 become a flag, so that a run ends at a step boundary with a checkpoint.

Schedulers send one of them some time before they take the machine away, and DeepSpeed's launcher
passes SIGTERM on to one rank after the other, with 30 s for each. The trainer spreads the flag to
all ranks with the loss of the step, and all save together.
"""

import signal
from types import FrameType, TracebackType
from typing import Any

# What `train.py` exits with after such a stop: EX_TEMPFAIL, "try again later".
REQUEUE_EXIT_CODE = 75


class StopSignals:
    """Within the `with` block, `received` turns True at the first SIGTERM or SIGUSR1.

    Processes forked inside inherit the harmless handler.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
