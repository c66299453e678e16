"""Stops all ranks of a start before they write where a newer start does, see ownership.py."""

from pathlib import Path

from routedvit.training.checkpoints.ownership import Owner, lost_to
from routedvit.training.config.base import ConfigError
from routedvit.training.engine import Engine


class OwnershipLost(ConfigError):
    """Another start of the run has begun since; the text says which."""


class Fence:
    """Asked before anything is written or deleted beside other starts.

    Args:
        engine: tells all ranks what rank 0 finds.
        folder: of the run.
        owner: this start, as `ownership.take` returned it; None: there can be no other.
    """

    def __init__(self, engine: Engine, folder: Path, owner: Owner | None) -> None:
        self.engine = engine
        self.folder = folder
        self.owner = owner

    @property
    def name(self) -> str:
        """Tells the temporary files of this start from those of another."""
        return self.owner.id[:8] if self.owner else "own"

    def check(self) -> None:
        """Go on, or stop. Collective.

        Raises:
            OwnershipLost: on every rank, if this start does not own the folder any more.
        """
        if self.owner is None:
            return
        lost = lost_to(self.folder, self.owner) if self.engine.rank == 0 else None
        if lost := self.engine.broadcast(lost):
            raise OwnershipLost(lost)
