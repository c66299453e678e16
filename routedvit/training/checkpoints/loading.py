"""Which checkpoint a run goes on from, and how it is restored.

A load checks every hash before anything is read, and nothing in a checkpoint is a pickle. A damaged
checkpoint is named and moved aside, and the one before it is used. All ranks must see one file
system.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from routedvit.training.checkpoints.fence import Fence
from routedvit.training.checkpoints.manifest import step_name
from routedvit.training.checkpoints.rollbacks import (
    forget_jumps,
    forget_origin,
    last_jump,
    note_jump,
    note_origin,
    read_jumps,
)
from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.checkpoints.shelf import Shelf
from routedvit.training.checkpoints.verification import find_fault
from routedvit.training.config.base import ConfigError
from routedvit.training.engine import Engine

T = TypeVar("T")


class Loader:
    """Restores checkpoints of one run. All methods are collective.

    Args:
        shelf: where they stand.
        engine: whose state is restored.
        fence: lets this start move or delete them, or not.
        tell: called on rank 0 with one line about a damaged checkpoint.

    `names` are the complete ones on the shelf, oldest first.
    """

    def __init__(
        self, shelf: Shelf, engine: Engine, fence: Fence, tell: Callable[[str], None]
    ) -> None:
        self.shelf = shelf
        self.folder = shelf.folder
        self.engine = engine
        self.fence = fence
        self.tell = tell

    def newest(self, names: list[str]) -> RunState | None:
        """See `Checkpoints.load_newest`."""
        if not names and self.engine.rank == 0:
            forget_origin(self.folder)  # of a start that came to no checkpoint of its own
        state = self._load_newest_of(names)
        if state is None and names:
            raise ConfigError(
                f"all {len(names)} checkpoints in {self.folder} are damaged; --fresh starts over"
            )
        return state

    def named(self, path: Path, names: list[str]) -> RunState:
        """See `Checkpoints.load_named`."""
        folder = self.folder / path if (self.folder / path).is_dir() else path
        # A link or '..' on the way must not make this run's own checkpoint another's.
        folder = folder.parent.resolve() / folder.name
        fault = find_fault(self.engine, folder)
        if fault is not None:
            raise ConfigError(f"--resume {path}: {folder} is no whole checkpoint ({fault})")
        if names and not self._is_own(folder):
            raise ConfigError(
                f"--resume {path}: this run has checkpoints of its own in {self.folder}; give it "
                "another name (--set name=...) or start over with --fresh"
            )
        self.fence.check()
        if self.engine.rank == 0 and names:
            self.shelf.point_to(folder.name)  # before what it names goes
            for name in (name for name in names if name > folder.name):
                aside = self.shelf.set_aside(name, "abandoned")
                self.tell(f"checkpoint {name} is later and was moved to {aside}")
            forget_jumps(self.folder, after=int(folder.name.removeprefix("step_")))
        state = self._load(folder)
        state.guard |= {"returns": 0}
        if not self._is_own(folder):  # what another run measured, maybe on other images
            state.best, state.metrics, state.evaluated, state.spent = {}, {}, [], {}
            self._note_origin(folder, state)
        return state

    def _note_origin(self, checkpoint: Path, state: RunState) -> None:
        if self.engine.rank == 0:
            try:
                note_origin(self.folder, checkpoint, state.step, state.samples_seen)
            except OSError as error:  # data.order and data.audit alone read it
                self.tell(f"{self.folder} does not say where the run began: {error}")

    def roll_back(
        self, names: list[str], before: int, resume_at: int, returns: int
    ) -> RunState | None:
        """See `Checkpoints.roll_back`."""
        state = self._load_newest_of([name for name in names if name < step_name(before)])
        if state is None:
            return None
        self.fence.check()
        if self.engine.rank == 0:
            start = read_run_state(self.shelf.path_of(state.step)).samples_seen
            jump = {"step": state.step, "from": start, "to": resume_at, "returns": returns}
            note_jump(self.folder, jump)
            # After the note: else a death here meets the bad data again.
            self.shelf.delete([name for name in self.shelf.names() if name >= step_name(before)])
        state.samples_seen = resume_at
        state.guard |= {"returns": returns, "good_steps": 0}
        return state

    def rollbacks(self) -> list[dict[str, int]]:
        """Each time this run went back, see `read_jumps`."""
        return self._from_rank_0(read_jumps, self.folder)

    def _load_newest_of(self, names: list[str]) -> RunState | None:
        """The newest whole one; those after it are set aside, but if none is whole all stay."""
        faults: dict[str, str] = {}
        for name in reversed(names):
            fault = find_fault(self.engine, self.folder / name)
            if fault is None:
                self._set_aside(faults, whole=name)
                return self._load(self.folder / name)
            faults[name] = fault
        self._set_aside(faults, whole=None)
        return None

    def _set_aside(self, faults: dict[str, str], whole: str | None) -> None:
        """Name the damaged ones and, if there is a whole one to go on from, move them."""
        self.fence.check()
        if self.engine.rank != 0:
            return
        if whole is not None:
            self.shelf.point_to(whole)  # before what it names goes
        for name, fault in faults.items():
            moved = ""
            if whole is not None:
                aside = self.shelf.set_aside(name, "damaged")
                moved = f"; moved to {aside}"
            self.tell(f"checkpoint {name} is damaged ({fault}){moved}")

    def _load(self, folder: Path) -> RunState:
        state = self._from_rank_0(read_run_state, folder)
        self.engine.load_state(folder)
        jumps = self._from_rank_0(read_jumps, folder.parent)
        if jump := last_jump(jumps, state.step, state.samples_seen):
            state.samples_seen = jump["to"]
            state.guard |= {"returns": jump.get("returns", 0), "good_steps": 0}
        return state

    def _from_rank_0(self, read: Callable[[Path], T], path: Path) -> T:
        """What it reads there: one question to the file system instead of one of every rank."""
        value: Any = read(path) if self.engine.rank == 0 else None
        found: T = self.engine.broadcast(value)
        return found

    def _is_own(self, folder: Path) -> bool:
        return folder.parent.resolve() == self.folder.resolve()
