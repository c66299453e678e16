"""How all ranks write one checkpoint, so that it is complete or invisible.

It is written into a hidden sibling folder; every rank syncs and hashes its own files, rank 0 writes
the manifest, and ONE rename makes the folder visible. When the disk fails one rank, all of them
give up together and the half-written folder goes.

The ranks meet before they write and after. In between each may write in a thread, from a copy in
the memory of the host, while training goes on. Where a start dies meanwhile, the next one counts
what all had written (publishing.py) and clears away what they had not.
"""

import dataclasses
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from routedvit.training.background import Background
from routedvit.training.checkpoints.fence import Fence
from routedvit.training.checkpoints.manifest import (
    claim_run_id,
    fingerprint,
    sync,
    write_json,
)
from routedvit.training.checkpoints.publishing import (
    Files,
    clear_hidden,
    discard,
    hidden,
    note_written,
    publish,
)
from routedvit.training.checkpoints.run_state import RUN_STATE, RunState
from routedvit.training.checkpoints.shelf import Shelf
from routedvit.training.config.base import ConfigError
from routedvit.training.distributed.proc import boot_id
from routedvit.training.engine import Engine
from routedvit.training.engine.state import TakenState
from routedvit.training.host_room import has_room_for
from routedvit.training.memory import readable

T = TypeVar("T")


class SaveError(ConfigError):
    """The disk did not take a checkpoint; its text says which disk, and the mend."""


class Commit:
    """One checkpoint on its way to the disk. Methods are collective, but for those of rank 0.

    Args:
        engine: whose state is saved.
        shelf: where it is to stand.
        fence: lets this start write, or not.
        state: what is saved with it.
    """

    def __init__(self, engine: Engine, shelf: Shelf, fence: Fence, state: RunState) -> None:
        self.engine = engine
        self.shelf = shelf
        self.fence = fence
        held = {"world_size": engine.world_size, "zero_stage": engine.zero_stage}
        self._run_state = dataclasses.asdict(state) | held  # a copy: the state goes on
        final = self.final = shelf.path_of(state.step)
        self.temporary = hidden(final, fence.name)
        here = f"{socket.gethostname()} {boot_id()}"
        shares = engine.gather((here, engine.share_bytes()))
        self.size = sum(size for _, size in shares)
        self.size_here = sum(size for machine, size in shares if machine == here)
        self._taken: TakenState | None = None
        self._thread: Background[Files] | None = None

    def run(self) -> None:
        """Write it while all wait.

        Raises:
            SaveError: the disk is full or fails; nothing is left of it.
            OwnershipLost: a newer start has begun meanwhile.
        """
        self._begin(copy=False)
        self.finish()

    def start(self) -> bool:
        """Take it as it is now and write it in a thread; `finish` makes it visible.

        False if there is no room for a copy in the memory of some rank's host: `finish` will write
        it while all wait.

        Raises:
            SaveError: there is no room for it on the disk.
        """
        copied = all(self.engine.gather(has_room_for(self.size_here)))
        self._begin(copy=copied)
        if copied:
            self._thread = Background(self._write, name=f"save {self.final.name}")
        return copied

    @property
    def is_writing(self) -> bool:
        """Whether the thread of this rank is at it; each rank has an answer of its own."""
        return self._thread is not None and self._thread.running

    def let_it_end(self, seconds: float) -> None:
        """Give the thread of this rank so much time to end."""
        if self._thread is not None:
            self._thread.wait(seconds)

    def finish(self) -> None:
        """Make it visible, once all have written it. Raises what `run` raises."""
        thread, self._thread = self._thread, None
        parts = self._on_all_ranks(thread.result if thread else self._write)
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        self.fence.check()
        self._on_all_ranks(lambda: self._publish(files))

    def _begin(self, *, copy: bool) -> None:
        """A folder, and what is to be written into it."""
        self._on_all_ranks(self._make)
        self._taken = self.engine.take_state(copy=copy)

    def _make(self) -> None:
        """The hidden folder, without what interrupted saves left. Rank 0."""
        if self.engine.rank != 0:
            return
        folder = self.shelf.folder
        self.shelf.finish_deletion()
        clear_hidden(folder)
        self.temporary.mkdir(parents=True)
        names = self.shelf.names()
        claim_run_id(folder, self.shelf.folder / names[-1] if names else None)
        if _free_bytes(folder) < self.size:  # logs and ledgers want the rest of the disk
            raise OSError("no space left")

    def _write(self) -> Files:
        """This rank's files, on disk, and their fingerprints by relative name."""
        taken, self._taken = self._taken, None  # the copy goes with the last file
        assert taken is not None
        taken.write(self.temporary)
        if self.engine.rank == 0:
            write_json(self.temporary / RUN_STATE, self._run_state)
        own = files_of(self.engine.rank, self.temporary)
        for path in own:
            sync(path)
        for folder in {path.parent for path in own}:
            sync(folder)
        files = {str(path.relative_to(self.temporary)): fingerprint(path) for path in own}
        note_written(self.temporary, self.engine.rank, files)
        return files

    def _publish(self, files: Files) -> None:
        """Make it visible. Rank 0."""
        if self.engine.rank == 0:
            publish(self.temporary, self.final, files)

    def _on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on each rank; if the disk fails one, all of them give up."""
        result: Any = None
        fault: str | None = None
        try:
            result = action()
        except OSError as error:
            fault = f"rank {self.engine.rank}: {error}"
        outcomes = self.engine.gather((result, fault))
        fault = next((fault for _, fault in outcomes if fault), None)
        if fault is None:
            return [result for result, _ in outcomes]
        self.fence.check()  # a newer start publishes or clears away what an older one has written
        if self.engine.rank == 0:
            discard(self.temporary)
        folder = self.shelf.folder
        raise SaveError(
            f"{self.final.name} was not saved ({fault}): it takes {readable(self.size)} and "
            f"{readable(_free_bytes(folder))} are free on the disk of {folder}; make room there, "
            "lower checkpoint.keep, or move the run to another disk and set output_dir to that"
        )


def files_of(rank: int, folder: Path) -> list[Path]:
    """What a rank has written below `folder`, without hidden files: those are being written.

    By name, since all ranks look at once: asking the file system about each file of each other rank
    would be half a million questions at 512 ranks.
    """
    names = "[!.]*" if rank == 0 else f"rank_{rank:05d}*"
    named = (path for path in folder.rglob(names) if writer_of(path) == rank)
    return sorted(path for path in named if path.is_file())


def writer_of(path: Path) -> int:
    """The rank that wrote a file of a checkpoint: its name says so, or else it was rank 0."""
    match = re.match(r"rank_(\d+)", path.name)
    return int(match.group(1)) if match else 0


def _free_bytes(folder: Path) -> int:
    """On the disk where `folder` is or would be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
