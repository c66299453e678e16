"""Checkpoints that are complete or invisible.

    checkpoints/step_00000100/manifest.json    the run; size and SHA-256 of every other file
                              run_state.json   step, samples seen, metrics, config, versions
                              shards/...       weights and optimiser state, see shards.py
                latest                         the name of the newest one
                run_id                         whose they are: another run's is not loaded
                rollbacks.json                 where the run went back to, see rollbacks.py

A checkpoint is written into a hidden sibling folder; every rank syncs and hashes its own files,
rank 0 writes the manifest, and ONE rename makes the folder visible. `latest` is replaced after
that, so at every instant it names a complete checkpoint. When the disk fails one rank, all of them
give up the save together and the half-written folder goes. After the rename nothing fails a save:
what goes wrong with `latest` or with deleting old ones is told, and the next save tries again.

A load checks every hash before anything is read, and nothing in a checkpoint is a pickle. A damaged
checkpoint is named and moved aside, and the one before it is used. All ranks must see one file
system.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from routedvit.training.config import ConfigError
from routedvit.training.engine import Engine
from routedvit.training.manifest import (
    MANIFEST,
    Fingerprint,
    Manifest,
    claim_run_id,
    fingerprint,
    first_fault,
    read_manifest,
    replace_text,
    run_id,
    step_name,
    sync,
    write_json,
)
from routedvit.training.retention import Retention
from routedvit.training.rollbacks import forget_jumps, last_jump, note_jump, read_jumps

T = TypeVar("T")
RUN_STATE, LATEST = "run_state.json", "latest"


class SaveError(ConfigError):
    """The disk did not take a checkpoint; its text says which disk, and the mend."""


@dataclasses.dataclass
class RunState:
    """Everything needed to go on besides weights and optimiser state; kept as JSON.

    Random numbers and the order of the data need no state: both follow from the seed and `step`
    (see `trainer.seed_step` and `interfaces.TrainLoader`).
    """

    step: int = 0  # finished optimiser steps
    samples_seen: int = 0  # over the whole world: the position in the data
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # best value per metric
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # evaluated at this step
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    guard: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `Guard.state`
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""  # the training shards, in a line; empty in checkpoints that did not say
    held_out: str = ""  # likewise those that metrics are measured on; empty if there are none
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    warm_start: dict[str, Any] | None = None  # what weights the run began from
    world_size: int = 0
    zero_stage: int = 0


class Checkpoints:
    """Saves and loads the checkpoints of one run. All methods are collective.

    Args:
        folder: `runs/NAME/checkpoints`; made when the first one is saved.
        engine: whose state is saved.
        retention: which ones to keep; a number is that many of the newest.
        tell: called on rank 0 with one line about a damaged checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        keep: Retention | int,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.retention = Retention(keep) if isinstance(keep, int) else keep
        self.tell = tell

    def save(self, state: RunState, *, bad_since: int | None = None) -> Path:
        """Write the checkpoint of `state.step`; a step that is already saved is left alone.

        Args:
            state: what to save.
            bad_since: the first of the present bad steps; the newest one before it stays.

        Raises:
            SaveError: the disk is full or fails; nothing is left of it and the others are whole.
        """
        engine = self.engine
        final = self.path_of(state.step)
        if engine.broadcast(final.exists()):
            return final
        temporary = self.folder / f".{final.name}.tmp"
        size = engine.state_bytes()
        self._on_all_ranks(lambda: self._make(temporary, size), temporary, size)
        parts = self._on_all_ranks(lambda: self._write(temporary, state), temporary, size)
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        self._on_all_ranks(lambda: self._publish(temporary, state.step, files), temporary, size)
        if engine.rank == 0:
            self._tidy(state.step, bad_since)
        engine.barrier()
        return final

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, whether it exists or not."""
        return self.folder / step_name(step)

    def wants(self, state: RunState) -> bool:
        """Whether the metric just evaluated makes this step one of the best to keep."""
        value = state.metrics.get(self.retention.metric)
        if value is None or not self.retention.keep_best:
            return False
        wanted = self.engine.rank == 0 and self.retention.is_among_best(value, self._values())
        return self.engine.broadcast(wanted)

    def load_newest(self) -> RunState | None:
        """Restore the newest checkpoint that is whole, whatever ranks and ZeRO stage wrote it.

        None if there is none.

        Raises:
            ConfigError: all checkpoints are damaged, or it cannot be right under this stage.
        """
        names = self.engine.broadcast([path.name for path in self._visible()])
        state = self._load_newest_of(names)
        if state is None and names:
            raise ConfigError(
                f"all {len(names)} checkpoints in {self.folder} are damaged; --fresh starts over"
            )
        return state

    def load_named(self, path: Path) -> RunState:
        """Restore this checkpoint, of this run or another's folder.

        Later ones of this run, which the steps to come would contradict, are set aside. Whoever
        names one has looked into what went wrong, so earlier returns no longer count.

        Raises:
            ConfigError: it is not there or not whole, or it is another run's and this one has some.
        """
        folder = self.folder / path if (self.folder / path).is_dir() else path
        # A link or '..' on the way must not make this run's own checkpoint another's.
        folder = folder.parent.resolve() / folder.name
        fault = self._first_fault(folder)
        if fault is not None:
            raise ConfigError(f"--resume {path}: {folder} is no whole checkpoint ({fault})")
        names = self.engine.broadcast([path.name for path in self._visible()])
        if names and not self._is_own(folder):
            raise ConfigError(
                f"--resume {path}: this run has checkpoints of its own in {self.folder}; give it "
                "another name (--set name=...) or start over with --fresh"
            )
        if self.engine.rank == 0 and names:
            self._point_to(folder.name)  # before what it names goes
            for name in (name for name in names if name > folder.name):
                aside = (self.folder / name).rename(self._free_name(f"abandoned_{name}"))
                self.tell(f"checkpoint {name} is later and was moved to {aside}")
            forget_jumps(self.folder, after=int(folder.name.removeprefix("step_")))
        state = self._load(folder)
        state.guard |= {"returns": 0}
        return state

    def roll_back(self, before: int, resume_at: int, returns: int = 1) -> RunState | None:
        """Restore the newest whole checkpoint from before step `before`; None if there is none.

        The data goes on at position `resume_at`, in every later load of that checkpoint too; later
        checkpoints are deleted. `returns` is how often the run has gone back with this time.
        """
        names = self.engine.broadcast([path.name for path in self._visible()])
        state = self._load_newest_of([name for name in names if name < step_name(before)])
        if state is None:
            return None
        if self.engine.rank == 0:
            start = read_run_state(self.path_of(state.step)).samples_seen
            jump = {"step": state.step, "from": start, "to": resume_at, "returns": returns}
            note_jump(self.folder, jump)
            for later in (path for path in self._visible() if path.name >= step_name(before)):
                self._delete(later)  # after the note: else a death here meets the bad data again
        state.samples_seen = resume_at
        state.guard |= {"returns": returns, "good_steps": 0}
        return state

    def rollbacks(self) -> list[dict[str, int]]:
        """Each time this run went back, see `read_jumps`."""
        return self.engine.broadcast(read_jumps(self.folder))

    def _load_newest_of(self, names: list[str]) -> RunState | None:
        """The newest whole one; those after it are set aside, but if none is whole all stay."""
        faults: dict[str, str] = {}
        for name in reversed(names):
            fault = self._first_fault(self.folder / name)
            if fault is None:
                self._set_aside(faults, whole=name)
                return self._load(self.folder / name)
            faults[name] = fault
        self._set_aside(faults, whole=None)
        return None

    def _set_aside(self, faults: dict[str, str], whole: str | None) -> None:
        """Name the damaged ones and, if there is a whole one to go on from, move them; rank 0."""
        if self.engine.rank != 0:
            return
        if whole is not None:
            self._point_to(whole)  # before what it names goes
        for name, fault in faults.items():
            moved = ""
            if whole is not None:
                aside = (self.folder / name).rename(self._free_name(f"damaged_{name}"))
                moved = f"; moved to {aside}"
            self.tell(f"checkpoint {name} is damaged ({fault}){moved}")

    def _load(self, folder: Path) -> RunState:
        state = read_run_state(folder)
        self.engine.load_state(folder)
        jumps = self.engine.broadcast(read_jumps(folder.parent))
        if jump := last_jump(jumps, state.step, state.samples_seen):
            state.samples_seen = jump["to"]
            state.guard |= {"returns": jump.get("returns", 0), "good_steps": 0}
        return state

    def _is_own(self, folder: Path) -> bool:
        return folder.parent.resolve() == self.folder.resolve()

    def _point_to(self, name: str) -> None:
        """Make `latest` name this checkpoint; rank 0."""
        replace_text(self.folder / LATEST, name + "\n")

    def _first_fault(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, in words; each rank checks its share of the files.

        Raises:
            ConfigError: on every rank, if any cannot read it: that says nothing about the files.
        """
        fault: str | None = None
        trouble: str | None = None
        try:
            files = read_manifest(folder, run_id(folder.parent))
            share = list(files)[self.engine.rank :: self.engine.world_size]
            fault = first_fault(folder, {name: files[name] for name in share})
        except (FileNotFoundError, ValueError) as error:
            fault = f"{MANIFEST}: {error}"
        except OSError as error:
            trouble = f"rank {self.engine.rank}: {error}"
        outcomes = self.engine.gather((fault, trouble))
        if found := next((trouble for _, trouble in outcomes if trouble), None):
            raise ConfigError(
                f"{folder} cannot be read ({found}); it may be whole and stays where it is: see to "
                "the disk and its rights and start again, or move it elsewhere to go without it"
            )
        return next((fault for fault, _ in outcomes if fault), None)

    def _on_all_ranks(self, action: Callable[[], T], temporary: Path, size: int) -> list[T]:
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
        if self.engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.engine.barrier()
        raise SaveError(
            f"{temporary.name[1:-4]} was not saved ({fault}): it takes {_gib(size)} and "
            f"{_gib(_free_bytes(self.folder))} are free on the disk of {self.folder}; make room "
            "there, set output_dir to another disk or lower checkpoint.keep"
        )

    def _make(self, temporary: Path, size: int) -> None:
        """The hidden folder, without what an interrupted save left; rank 0."""
        if self.engine.rank == 0:
            for leftover in self.folder.glob(".step_*.tmp"):
                shutil.rmtree(leftover, ignore_errors=leftover != temporary)
            temporary.mkdir(parents=True)
            claim_run_id(self.folder, next(reversed(self._visible()), None))
            if _free_bytes(self.folder) < size:  # logs and ledgers want the rest of the disk
                raise OSError("no space left")

    def _write(self, temporary: Path, state: RunState) -> dict[str, Fingerprint]:
        """This rank's files, on disk, and their fingerprints by relative name."""
        engine = self.engine
        engine.save_state(temporary)
        if engine.rank == 0:
            state = dataclasses.replace(
                state, world_size=engine.world_size, zero_stage=engine.zero_stage
            )
            write_json(temporary / RUN_STATE, dataclasses.asdict(state))
        files = sorted(path for path in temporary.rglob("[!.]*") if path.is_file())
        own = [path for path in files if _writer_of(path) == engine.rank]  # hidden: being written
        for path in own:
            sync(path)
        return {str(path.relative_to(temporary)): fingerprint(path) for path in own}

    def _publish(self, temporary: Path, step: int, files: dict[str, Fingerprint]) -> None:
        """Manifest and rename. Rank 0."""
        if self.engine.rank != 0:
            return
        manifest = Manifest(run=run_id(self.folder), step=step, files=files)
        write_json(temporary / MANIFEST, manifest.model_dump())
        for folder in (path for path in temporary.rglob("*") if path.is_dir()):
            sync(folder)
        sync(temporary)
        temporary.rename(self.path_of(step))

    def _tidy(self, step: int, bad_since: int | None) -> None:
        """`latest` and retention after a save. Rank 0; the checkpoint is there whatever fails."""
        try:
            sync(self.folder)
            self._point_to(step_name(step))
        except OSError as error:
            self.tell(f"{step_name(step)} was saved, but {LATEST} does not name it yet: {error}")
            return  # what `latest` still names must not go
        for old in self.retention.surplus(self._values(), before=bad_since):
            self._delete(self.path_of(old))

    def _delete(self, folder: Path) -> None:
        """Delete a checkpoint; what cannot be deleted (NFS keeps open files) is told."""
        try:
            # Renamed first: half a deletion must not look like a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))
        except OSError as error:
            self.tell(f"checkpoint {folder.name} could not be deleted: {error}")

    def _values(self) -> dict[int, float | None]:
        """The kept metric of every checkpoint by its step, None where there is none to read."""
        values: dict[int, float | None] = {}
        for path in self._visible():
            value = None
            if self.retention.keep_best:
                # A damaged one has no value; a load will name it.
                with contextlib.suppress(OSError, ValueError, TypeError):
                    value = read_run_state(path).metrics.get(self.retention.metric)
            values[int(path.name.removeprefix("step_"))] = value
        return values

    def _visible(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step_*") if path.is_dir())

    def _free_name(self, name: str) -> Path:
        numbered = (
            self.folder / f"{name}{suffix}" for suffix in ("", *map(".{}".format, range(99)))
        )
        return next(path for path in numbered if not path.exists())


def read_run_state(folder: Path) -> RunState:
    """The run state of a checkpoint."""
    return RunState(**json.loads((folder / RUN_STATE).read_text(encoding="utf-8")))


def _writer_of(path: Path) -> int:
    """The rank that wrote a file of a checkpoint: its name says so, or else it was rank 0."""
    match = re.match(r"rank_(\d+)", path.name)
    return int(match.group(1)) if match else 0


def _free_bytes(folder: Path) -> int:
    """On the disk where `folder` is or would be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
