"""The checkpoints of a run: saving, choosing one to load, going back.

    checkpoints/step_00000100/manifest.json    the run; size and SHA-256 of every other file
                              run_state.json   step, samples seen, config, versions
                              shards/...       weights and optimiser state, see shards.py
                              evaluation.json  what was measured later, see run_state.py
                latest                         the name of the newest one
                run_id                         whose they are: another run's is not loaded
                origin.json, rollbacks.json    where it began and went back to, see rollbacks.py
    ../owner.json                              which start of the run may write, see ownership.py

A checkpoint appears by one rename (commit.py): at once or, if it is written in the background, when
it is settled (pending.py). `latest` is replaced after that, so at every instant it names a complete
one. After the rename nothing fails a save: what goes wrong with `latest` or with deleting old ones
is told, and the next save tries again. What can be loaded, and how, is told in loading.py.
"""

from collections.abc import Callable
from pathlib import Path

from routedvit.training.checkpoints.commit import Commit
from routedvit.training.checkpoints.fence import Fence
from routedvit.training.checkpoints.loading import Loader
from routedvit.training.checkpoints.mirror import Mirror
from routedvit.training.checkpoints.ownership import Owner
from routedvit.training.checkpoints.pending import Pending
from routedvit.training.checkpoints.progress import note_progress
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState, write_evaluation
from routedvit.training.checkpoints.shelf import Shelf
from routedvit.training.config.base import ConfigError
from routedvit.training.engine import Engine

SECONDS_A_LOOK = 5.0  # for what rank 0 alone waits, so that no collective of the others times out


class Checkpoints:
    """Saves and loads the checkpoints of one run. All methods are collective.

    Args:
        folder: `runs/NAME/checkpoints`; made when the first one is saved.
        engine: whose state is saved.
        retention: which ones to keep; a number is that many of the newest.
        owner: the start that writes here; None: no other start can be.
        mirror: rank 0's, told of whatever changes; None: there is no copy of the run.
        tell: called on rank 0 with one line about a damaged checkpoint.

    Whatever writes or deletes raises `OwnershipLost` on all ranks once a newer start has begun.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        keep: Retention | int,
        owner: Owner | None = None,
        mirror: Mirror | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.fence = Fence(engine, folder.parent, owner)
        self.retention = Retention(keep) if isinstance(keep, int) else keep
        self.mirror = mirror
        if mirror is not None:
            mirror.tell = self._tell
        self.tell = tell  # who has a better place for lines may set another
        self.shelf = Shelf(folder, self.retention, self._tell)
        self.pending = Pending(self._welcome, self._tell)
        self._loader = Loader(self.shelf, engine, self.fence, self._tell)

    def _tell(self, line: str) -> None:
        self.tell(line)

    def save(
        self, state: RunState, *, bad_since: int | None = None, in_background: bool = False
    ) -> Path:
        """Write the checkpoint of `state.step`; a step that is already saved is left alone.

        Args:
            state: what to save.
            bad_since: the first of the present bad steps; the newest one before it stays.
            in_background: return once there is a copy of it in the memory of the host, which a
                thread writes; `settle` makes it visible. Not while there are bad steps.

        Raises:
            SaveError: the disk is full or fails; nothing is left of it and the others are whole.
        """
        self.pending.make_room(tell=in_background)
        final = self.path_of(state.step)
        self.fence.check()
        # Rank 0 alone looks: NFS would go on telling the others for a minute that it is not there.
        if self.engine.broadcast(self.engine.rank == 0 and final.exists()):
            return final
        commit = Commit(self.engine, self.shelf, self.fence, state)
        if in_background:
            self.pending.start(commit)
        else:
            commit.run()
            self._welcome(final.name, bad_since)
        return final

    def settle(self) -> None:
        """Make the checkpoint visible that is written in the background, if there is one.

        Waits until all ranks have written it. All that asks for checkpoints settles first.
        """
        self.pending.settle()

    def _welcome(self, name: str, bad_since: int | None = None) -> None:
        if self.engine.rank == 0:
            self.shelf.welcome(name, bad_since)
            note_progress()
            self._follow()
        self.engine.barrier()

    def add_evaluation(self, state: RunState, *, bad_since: int | None = None) -> None:
        """Add what was evaluated to the checkpoint of `state.step`, if it was saved.

        Args:
            state: of which only `EVALUATED` is written.
            bad_since: as in `save`; a value may make an earlier one surplus.
        """
        self.settle()
        self.fence.check()
        folder = self.path_of(state.step)
        if self.engine.rank == 0 and folder.exists():
            try:
                write_evaluation(folder, state)
                self.shelf.delete_surplus(bad_since)
                self._follow()
            except OSError as error:
                self.tell(f"{folder.name} was saved, but not what was evaluated: {error}")
        self.engine.barrier()

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, whether it exists or not."""
        return self.shelf.path_of(step)

    def names(self) -> list[str]:
        """The complete checkpoints, oldest first; they may be damaged.

        Raises:
            ConfigError: on every rank, if rank 0 cannot list them.
        """
        self.settle()
        names: list[str] = []
        trouble: str | None = None
        try:
            names = self.shelf.names()
        except OSError as error:
            trouble = f"{self.folder} cannot be read ({error}); see to the disk and its rights"
        names, trouble = self.engine.broadcast((names, trouble))
        if trouble is not None:
            raise ConfigError(trouble)
        return names

    def wants(self, state: RunState) -> bool:
        """Whether the metric just evaluated makes this step one of the best to keep."""
        self.settle()
        value = state.metrics.get(self.retention.metric)
        if value is None or not self.retention.keep_best:
            return False
        wanted = False
        if self.engine.rank == 0:
            try:
                wanted = self.retention.is_among_best(value, self.shelf.values())
            except OSError as error:
                self.tell(f"whether step {state.step} is among the best cannot be told: {error}")
        return self.engine.broadcast(wanted)

    def load_newest(self) -> RunState | None:
        """Restore the newest checkpoint that is whole, whatever ranks and ZeRO stage wrote it.

        None if there is none.

        Raises:
            ConfigError: all checkpoints are damaged, or it cannot be right under this stage.
        """
        state = self._loader.newest(self.names())
        self._follow()
        return state

    def load_named(self, path: Path) -> RunState:
        """Restore this checkpoint, of this run or another's folder.

        Later ones of this run, which the steps to come would contradict, are set aside. Whoever
        names one has looked into what went wrong, so earlier returns no longer count.

        Raises:
            ConfigError: it is not there or not whole, or it is another run's and this one has some.
        """
        state = self._loader.named(path, self.names())
        self._follow()  # before another start takes what was set aside for what it lacks
        return state

    def roll_back(self, before: int, resume_at: int, returns: int = 1) -> RunState | None:
        """Restore the newest whole checkpoint from before step `before`; None if there is none.

        The data goes on at position `resume_at`, in every later load of that checkpoint too; later
        checkpoints are deleted. `returns` is how often the run has gone back with this time.
        """
        state = self._loader.roll_back(self.names(), before, resume_at, returns)
        self._follow()
        return state

    def rollbacks(self) -> list[dict[str, int]]:
        """Each time this run went back, see `read_jumps`."""
        return self._loader.rollbacks()

    def _follow(self, *, last: bool = False) -> None:
        if self.mirror is not None:
            self.mirror.follow(last=last)

    def close(self) -> None:
        """Nothing changes in the run folder any more: wait for what goes on beside it."""
        if self.engine.rank == 0:
            self.shelf.finish_deletion()
        self._follow(last=True)
        told = False
        while self.engine.broadcast(self.mirror is not None and self.mirror.wait(SECONDS_A_LOOK)):
            if self.mirror is not None and not told:
                told = True
                self.tell(f"waiting until {self.mirror.place} is like the run folder")
