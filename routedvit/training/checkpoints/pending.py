"""The checkpoint that is written beside the training: one at most, visible once it is settled."""

import time
from collections.abc import Callable

from routedvit.training.checkpoints.commit import Commit, SaveError
from routedvit.training.memory import readable

WORTH_A_LINE = 2.0  # seconds


class Pending:
    """Holds it from its start until it is settled. Every method is collective.

    Args:
        welcome: called with the name of one that has become visible.
        tell: called on rank 0 with a line about one that has not, or that held training up.
    """

    def __init__(self, welcome: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._welcome = welcome
        self._commit: Commit | None = None  # the same on all ranks
        self._told = False

    def __bool__(self) -> bool:
        return self._commit is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing, so that `settle` would wait; not collective."""
        return self._commit is not None and self._commit.is_writing

    def start(self, commit: Commit) -> None:
        """Let the only one be written in the background. Raises what `Commit.start` raises.

        Where there is no room for a copy it is written while all wait, and so it is told.
        """
        in_background = commit.start()
        self._commit = commit
        if not in_background:
            self._tell_once(
                f"{commit.final.name} is written while training waits: the memory of a host has no "
                f"room for a copy ({readable(commit.size)} on all ranks together); "
                "checkpoint.in_background = false says so from the start"
            )
            self.settle()

    def let_it_end(self, seconds: float) -> None:
        """Give this rank's thread a little time, since what all have written counts at the next
        start (publishing.py); not collective.
        """
        if self._commit is not None:
            self._commit.let_it_end(seconds)

    def settle(self) -> None:
        """Make it visible once all ranks have written it.

        That the disk did not take it is told and no error: the next save tries again.
        """
        commit, self._commit = self._commit, None
        if commit is None:
            return
        try:
            commit.finish()
        except SaveError as error:
            self.tell(f"{error}; the run goes on and tries again at the next one")
        else:
            self._welcome(commit.final.name)

    def make_room(self, *, tell: bool) -> None:
        """Settle before the next one, and `tell` if that took long."""
        began, commit = time.monotonic(), self._commit
        self.settle()
        seconds = time.monotonic() - began
        if tell and commit is not None and seconds > WORTH_A_LINE:
            self._tell_once(
                f"training waited {seconds:.0f} s for {commit.final.name}, which was still being "
                "written when the next was due; raise checkpoint.every_steps, or put the run on a "
                "faster disk"
            )

    def _tell_once(self, line: str) -> None:
        if not self._told:
            self._told = True
            self.tell(line)
