"""The checkpoint that is written beside the training: one at most, visible once it is settled."""

import time
from collections.abc import Callable

from routedvit.training.checkpoints.commit import Commit, SaveError

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
        self._told_to_wait = False

    def __bool__(self) -> bool:
        return self._commit is not None

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing, so that `settle` would wait; not collective."""
        return self._commit is not None and self._commit.is_writing

    def start(self, commit: Commit) -> None:
        """Let a checkpoint be written in the background. Raises what `Commit.start` raises."""
        self.settle()
        commit.start()
        self._commit = commit

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

    def make_room(self) -> None:
        """Settle before the next save, and say once if that took long."""
        began, commit = time.monotonic(), self._commit
        self.settle()
        seconds = time.monotonic() - began
        if commit is not None and seconds > WORTH_A_LINE and not self._told_to_wait:
            self._told_to_wait = True
            self.tell(
                f"training waited {seconds:.0f} s for {commit.final.name}, which was still being "
                "written when the next was due; raise checkpoint.every_steps, or put the run on a "
                "faster disk"
            )
