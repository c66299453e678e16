"""Wishes to stop become a flag, so that a run ends at a step boundary with a checkpoint.

Schedulers send SIGTERM or SIGUSR1 some time before they take the machine away, people press Ctrl-C
or lose their terminal (SIGHUP, of which nothing is to come under nohup), and DeepSpeed's launcher
passes SIGTERM on to one rank after the other, with 30 s for each. The trainer spreads the flag to
all ranks with the loss of the step, and all save together.

One wish arrives as no signal at all: `deepspeed` on a single machine dies of a SIGTERM without
telling anyone, and its ranks would train on, unseen, in the way of the next start. So a rank under
a launcher also looks whether that is still there (two small reads from /proc per step).

Before the ranks have met there is nothing to save and no step to wait for: there a wish ends the
process at once, see `StopSignals.at_once`.
"""

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from routedvit.training.distributed.proc import command_of, parent_of

# What `train.py` exits with after such a stop: EX_TEMPFAIL, "try again later".
REQUEUE_EXIT_CODE = 75

WISHES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

NODE_LAUNCHERS = (
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "launch/node.sh",
)


class StopSignals:
    """Within the `with` block the `WISHES`, of SIGINT the first, only make `wanted` true.

    `train.py` enters it before it builds anything: a wish that comes while a checkpoint is loaded
    must not end as a crash. Processes forked inside inherit the harmless handler. A second SIGINT
    interrupts as usual.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, Any] = {}
        self._launchers = launcher_chain()

    @property
    def wanted(self) -> bool:
        """Whether this process was asked to stop or has lost its launcher."""
        return self._received or any(parent_of(pid) != parent for pid, parent in self._launchers)

    def __enter__(self) -> "StopSignals":
        for number in WISHES:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:  # nohup
                continue
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

    @contextmanager
    def at_once(self, tell: Callable[[str], None]) -> Iterator[None]:
        """Around a wait for other machines: a wish, old or new, ends the process with exit code 75.

        Python calls no handler while such a wait blocks in C++, for minutes. But the C half of
        every handler writes to the wakeup descriptor, and a thread can wait for that. Main thread
        only.

        Args:
            tell: called with one line before the process ends.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno())
        watch = threading.Thread(target=self._leave_on_wish, args=(reader, tell), daemon=True)
        watch.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            writer.close()  # which the thread takes for the end
            watch.join()
            reader.close()

    def _leave_on_wish(self, reader: socket.socket, tell: Callable[[str], None]) -> None:
        while not self.wanted:
            if not select.select([reader], [], [], 1.0)[0]:
                continue  # has the launcher gone meanwhile?
            number = reader.recv(1)
            if not number:
                return
            if number[0] in WISHES:
                break
        tell("stopped before the first step; the same command starts it")
        os._exit(REQUEUE_EXIT_CODE)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def launcher_chain() -> list[tuple[int, int]]:
    """(process, its parent) pairs that hold as long as the launchers of this process live.

    Empty without a launcher: whoever runs plain `python train.py` may log out. Under `deepspeed`
    the parent is its per-node launcher, whose own parent is the command the user typed.
    """
    me, parent = os.getpid(), os.getppid()
    command = command_of(parent)
    if not any(name in command for name in NODE_LAUNCHERS):
        return []
    chain = [(me, parent)]
    if NODE_LAUNCHERS[0] in command and (grandparent := parent_of(parent)):
        chain.append((parent, grandparent))
    return chain
