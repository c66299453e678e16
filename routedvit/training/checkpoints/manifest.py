"""What makes a checkpoint whole: a manifest with the size and SHA-256 of every file in it.

Also the small ways of writing that survive a crash: synced, and replaced rather than changed.
"""

import errno
import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

MANIFEST, RUN_ID = "manifest.json", "run_id"
EVALUATION = "evaluation.json"  # added to a checkpoint after its manifest, see run_state.py


class Fingerprint(pydantic.BaseModel):
    """What a file must be."""

    size: int  # bytes
    sha256: str


class Manifest(pydantic.BaseModel):
    """manifest.json of a checkpoint."""

    format: Literal[2] = 2
    run: str = ""  # whose it is; empty in older ones
    step: int
    files: dict[str, Fingerprint]  # by name relative to the checkpoint


def read_manifest(folder: Path, run: str = "") -> dict[str, Fingerprint]:
    """The files of a checkpoint, by relative name.

    Args:
        folder: the checkpoint.
        run: whose it must be, if the manifest says; empty: anyone's.

    Raises:
        ValueError: it is not a manifest of this format, step and run, or it does not list the files
            that lie there, all of them (a load would read any that carries the right name) and no
            others. Hidden ones are read by none, nor are later additions that stand for themselves.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except pydantic.ValidationError as error:
        raise ValueError(f"no manifest of format 2: {error.errors()[0]['msg']}") from None
    if folder.name != step_name(manifest.step):
        raise ValueError(f"it is of step {manifest.step}")
    if run and manifest.run and manifest.run != run:
        raise ValueError("it is of another run; --resume with another name begins a run from it")
    files = [path for path in folder.rglob("[!.]*") if path.is_file()]
    present = {str(path.relative_to(folder)) for path in files}
    if unlisted := present - manifest.files.keys() - {MANIFEST, EVALUATION}:
        raise ValueError(f"{min(unlisted)} is not listed")
    if missing := manifest.files.keys() - present:
        raise ValueError(f"{min(missing)} is missing")
    return manifest.files


def step_name(step: int) -> str:
    """'step_00000100': sorts by step."""
    return f"step_{step:08d}"


def first_fault(
    folder: Path,
    files: dict[str, Fingerprint],
    is_there: Callable[[Path], bool] = Path.is_file,
) -> str | None:
    """The first of `files` that is missing or differs from its manifest entry, in words."""
    for name, expected in files.items():
        path = folder / name
        if not is_there(path):
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


def run_id(folder: Path) -> str:
    """Whose checkpoints lie in `folder`, by the file RUN_ID in it; empty if it is missing."""
    path = folder / RUN_ID
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def claim_run_id(folder: Path, newest: Path | None) -> None:
    """Write RUN_ID if it is missing: that of the newest checkpoint, or else a new one."""
    if run_id(folder):
        return
    known = ""
    if newest is not None:
        known = json.loads((newest / MANIFEST).read_text(encoding="utf-8")).get("run", "")
    replace_text(folder / RUN_ID, (known or uuid.uuid4().hex) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write and sync a JSON file."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the old text or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def numbered(path: Path) -> Iterator[Path]:
    """NAME, NAME.1, NAME.2, ...: for what must not take another's place."""
    yield path
    yield from (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))


def sync(path: Path) -> None:
    """fsync a file, or a folder where its file system can (some FUSE and CIFS cannot).

    Raises:
        OSError: what it holds did not reach the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
