"""From a hidden folder that all ranks have written to a checkpoint that is seen.

    .step_00000100.3f2a91c4.tmp/           by the start whose id begins so
        .rank_00005.written                what rank 5 has written: size and SHA-256 of each
        run_state.json, shards/...         see checkpoint.py

Each rank notes what it has written beside it. Ranks that live gather these notes and rank 0 makes
the checkpoint visible. If a start ends between the two, the notes of all are there all the same,
and the next start of the run does that: nothing that was written is lost, whoever died.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pydantic

from routedvit.training.checkpoints.manifest import (
    MANIFEST,
    Fingerprint,
    Manifest,
    run_id,
    sync,
    write_json,
)
from routedvit.training.checkpoints.run_state import RUN_STATE

# Not what `Shelf.delete` and `discard` hide, which is on its way out.
HIDDEN = re.compile(r"\.(step_\d{8,})\.[^.]+\.tmp")

Files = dict[str, Fingerprint]  # by name relative to the checkpoint
NOTE = pydantic.TypeAdapter(Files)


def hidden(final: Path, start: str) -> Path:
    """Where a start writes what will be `final`."""
    return final.with_name(f".{final.name}.{start}.tmp")


def note_written(folder: Path, rank: int, files: Files) -> None:
    """All that a rank has to write is on disk: these."""
    notes = {name: entry.model_dump() for name, entry in files.items()}
    write_json(_note(folder, rank), notes)
    sync(folder)


def publish(folder: Path, final: Path, files: Files) -> None:
    """Write the manifest of a hidden folder, and make it visible by one rename. Rank 0."""
    step = int(final.name.removeprefix("step_"))
    manifest = Manifest(run=run_id(final.parent), step=step, files=files)
    write_json(folder / MANIFEST, manifest.model_dump())
    for note in folder.glob(".rank_*.written"):
        note.unlink(missing_ok=True)
    for inner, _, _ in os.walk(folder, topdown=False):  # asks nothing about the files
        sync(Path(inner))
    folder.rename(final)


def written_whole(folder: Path) -> dict[Path, Files]:
    """The hidden folders in which all ranks of an earlier start have written, oldest first.

    Args:
        folder: of the checkpoints; need not exist.
    """
    found: dict[Path, Files] = {}
    for path in sorted(folder.glob(".step_*.tmp")):
        match = HIDDEN.fullmatch(path.name)
        if match and not (folder / match.group(1)).exists() and (files := _written(path)):
            found[path] = files
    return found


def publish_written(folder: Path) -> list[str]:
    """Make those visible; returns their names. Rank 0 of the start that owns the run.

    Raises:
        OSError: the disk does not let it; nothing is lost.
    """
    names = []
    for path, files in written_whole(folder).items():
        final = path.with_name(path.name.split(".")[1])
        try:
            publish(path, final, files)
        except OSError:
            if path.exists() and not final.exists():  # else the start that wrote it did, just now
                raise
        names.append(final.name)
    return [*dict.fromkeys(names)]  # two copies of a step are one


def clear_hidden(folder: Path) -> None:
    """Delete what is hidden there, written whole or not. Rank 0."""
    paths = [*folder.glob(".step_*.tmp")]
    for path in sorted(paths, key=lambda path: HIDDEN.fullmatch(path.name) is not None):
        discard(path)


def discard(path: Path) -> None:
    """Delete a hidden folder; what cannot be deleted stays."""
    if HIDDEN.fullmatch(path.name):
        # Renamed first: half a deletion must not look whole, nor may a start on another machine
        # go on to write there.
        with contextlib.suppress(OSError):
            path = path.rename(path.with_name(path.name.removesuffix(".tmp") + ".gone.tmp"))
    shutil.rmtree(path, ignore_errors=True)


def _written(path: Path) -> Files | None:
    """All files of a hidden folder, if all ranks have written theirs and they are there."""
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # pydantic's is a ValueError
        files = _noted(path)
        if all((path / name).stat().st_size == entry.size for name, entry in files.items()):
            return files
    return None


def _noted(path: Path) -> Files:
    with contextlib.suppress(OSError, ValueError):
        return Manifest.model_validate_json((path / MANIFEST).read_bytes()).files
    files: Files = {}
    state = json.loads((path / RUN_STATE).read_text(encoding="utf-8"))
    for rank in range(state["world_size"]):
        files |= NOTE.validate_json(_note(path, rank).read_bytes())
    return files


def _note(folder: Path, rank: int) -> Path:
    return folder / f".rank_{rank:05d}.written"
