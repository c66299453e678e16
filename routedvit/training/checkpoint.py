"""Checkpoints that are complete or invisible.

    checkpoints/step_00000100/manifest.json    size and SHA-256 of every other file
                              run_state.json   step, samples seen, best metrics, config, versions
                              deepspeed/...    sharded weights and optimiser state
                latest                         the name of the newest one

A checkpoint is written into a hidden sibling folder; every rank syncs and hashes its own files,
rank 0 writes the manifest, and ONE rename makes the folder visible. `latest` is replaced after
that, so at every instant it names a complete checkpoint. DeepSpeed's own `latest` gives none of
this: it is written in place before the other ranks have finished.

A load checks every hash before the first byte is unpickled. A damaged checkpoint is named and moved
aside, and the one before it is used. All ranks must see one file system.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic

from routedvit.training.config import ConfigError
from routedvit.training.engine import Engine

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"
LATEST = "latest"


class Fingerprint(pydantic.BaseModel):
    """What a file must be."""

    size: int  # bytes
    sha256: str


class Manifest(pydantic.BaseModel):
    """manifest.json of a checkpoint."""

    format: Literal[2] = 2
    step: int
    files: dict[str, Fingerprint]  # by name relative to the checkpoint


@dataclasses.dataclass
class RunState:
    """Everything needed to go on besides weights and optimiser state; kept as JSON.

    Random numbers and the order of the data need no state: both follow from the seed and `step`
    (see `trainer.seed_step` and `interfaces.TrainLoader`).
    """

    step: int = 0  # finished optimiser steps
    samples_seen: int = 0  # over the whole world: the position in the data
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # highest value per metric
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    world_size: int = 0
    zero_stage: int = 0


class Checkpoints:
    """Saves and loads the checkpoints of one run. All methods are collective.

    Args:
        folder: `runs/NAME/checkpoints`; made when the first one is saved.
        engine: whose state is saved.
        keep: how many of the newest to keep.
        tell: called on rank 0 with one line about a damaged checkpoint.
    """

    def __init__(
        self, folder: Path, engine: Engine, *, keep: int, tell: Callable[[str], None] = print
    ) -> None:
        self.folder = folder
        self.engine = engine
        self.keep = keep
        self.tell = tell

    def save(self, state: RunState) -> Path:
        """Write the checkpoint of `state.step`; a step that is already saved is left alone."""
        engine = self.engine
        final = self.path_of(state.step)
        if engine.broadcast(final.exists()):
            return final
        temporary = self.folder / f".{final.name}.tmp"
        if engine.rank == 0:
            for leftover in self.folder.glob(".step_*.tmp"):  # of a save that was interrupted
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        engine.barrier()
        engine.save_state(temporary)
        if engine.rank == 0:
            state = dataclasses.replace(
                state, world_size=engine.world_size, zero_stage=engine.zero_stage
            )
            write_json(temporary / RUN_STATE, dataclasses.asdict(state))
        engine.barrier()
        parts = engine.gather(self._seal_own_files(temporary))
        if engine.rank == 0:
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            manifest = Manifest(step=state.step, files=files)
            write_json(temporary / MANIFEST, manifest.model_dump())
            for folder in (path for path in temporary.rglob("*") if path.is_dir()):
                _sync(folder)
            _sync(temporary)
            temporary.rename(final)
            _sync(self.folder)
            self._point_latest_at(final)
            self._delete_old()
        engine.barrier()
        return final

    def path_of(self, step: int) -> Path:
        """Folder of the checkpoint of `step`, whether it exists or not."""
        return self.folder / step_name(step)

    def load_newest(self) -> RunState | None:
        """Restore the newest checkpoint that is whole; None if there is none.

        Raises:
            ConfigError: it was written by another number of ranks or another ZeRO stage, or all
                checkpoints are damaged.
        """
        names = self.engine.broadcast([path.name for path in self._visible()])
        for name in reversed(names):
            folder = self.folder / name
            fault = self._first_fault(folder)
            if fault is None:
                return self._load(folder)
            if self.engine.rank == 0:
                aside = folder.rename(self._free_name(f"damaged_{name}"))
                self.tell(f"checkpoint {name} is damaged ({fault}); moved to {aside}")
        if names:
            raise ConfigError(
                f"all {len(names)} checkpoints in {self.folder} are damaged; --fresh starts over"
            )
        return None

    def _load(self, folder: Path) -> RunState:
        state = RunState(**json.loads((folder / RUN_STATE).read_text(encoding="utf-8")))
        self.engine.load_state(folder)
        if self.engine.rank == 0:
            self._point_latest_at(folder)
        return state

    def _first_fault(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, in words; each rank checks its share of the files."""
        try:
            files = read_manifest(folder)
        except (OSError, ValueError) as error:
            fault: str | None = f"{MANIFEST}: {error}"
        else:
            share = list(files)[self.engine.rank :: self.engine.world_size]
            fault = first_fault(folder, {name: files[name] for name in share})
        return next(filter(None, self.engine.gather(fault)), None)

    def _seal_own_files(self, temporary: Path) -> dict[str, Fingerprint]:
        """Sync this rank's files to disk and fingerprint them, by relative name."""
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        own = [path for path in files if _writer_of(path) == self.engine.rank]
        for path in own:
            _sync(path)
        return {str(path.relative_to(temporary)): fingerprint(path) for path in own}

    def _point_latest_at(self, folder: Path) -> None:
        _replace(self.folder / LATEST, folder.name + "\n")

    def _delete_old(self) -> None:
        for folder in self._visible()[: -self.keep]:
            # Renamed first: half a deletion must not look like a checkpoint.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))

    def _visible(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step_*") if path.is_dir())

    def _free_name(self, name: str) -> Path:
        numbered = (
            self.folder / f"{name}{suffix}" for suffix in ("", *map(".{}".format, range(99)))
        )
        return next(path for path in numbered if not path.exists())


def read_manifest(folder: Path) -> dict[str, Fingerprint]:
    """The files of a checkpoint, by relative name.

    Raises:
        ValueError: it is not a manifest of this format and step, or it does not list every file
            that lies there (DeepSpeed would unpickle any that carries the right name).
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except pydantic.ValidationError as error:
        raise ValueError(f"no manifest of format 2: {error.errors()[0]['msg']}") from None
    if folder.name != step_name(manifest.step):
        raise ValueError(f"it is of step {manifest.step}")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if unlisted := present - manifest.files.keys() - {MANIFEST}:
        raise ValueError(f"{min(unlisted)} is not listed")
    return manifest.files


def step_name(step: int) -> str:
    """'step_00000100': sorts by step."""
    return f"step_{step:08d}"


def first_fault(folder: Path, files: dict[str, Fingerprint]) -> str | None:
    """The first of `files` that is missing or differs from its manifest entry, in words."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        if fingerprint(path) != expected:
            return f"{name} does not match its SHA-256"
    return None


def fingerprint(path: Path) -> Fingerprint:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return Fingerprint(size=file.tell(), sha256=digest.hexdigest())


def write_json(path: Path, value: Any) -> None:
    """Write and sync a JSON file."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _writer_of(path: Path) -> int:
    """The rank that wrote a file of a checkpoint: its name says so, or else it was rank 0."""
    match = re.match(r"rank_(\d+)", path.name)
    return int(match.group(1)) if match else 0


def _replace(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
