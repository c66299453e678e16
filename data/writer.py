"""Writes the shards of a split: in parallel, whole or not at all, and the same bytes every time.

A shard gets its final name after its bytes are on the disk, and a note beside it (.parts/NAME.json)
with its hash and statistics. A writer that was stopped finds the notes and goes on; the manifest is
put together from them at the end, and the notes go. Member times and owners are fixed, so that the
same images make the same SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.decode import MAX_PIXELS, open_image
from data.encoding import Encoded, Encoding
from data.errors import BadSample, DataError
from data.index_file import SUFFIX, content_for, entry_for, unpack
from data.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    publish,
    sha256_of,
    write_atomically,
    write_manifest,
)
from data.pool import each
from data.skipped import DEFAULT_SHARE, Skipped
from data.sources import Reference, Split, whereabouts
from data.statistics import ShardStatistics, combine

PARTS = ".parts"


@dataclass(frozen=True)
class _Job:
    """One shard to write."""

    path: Path
    references: list[Reference]
    encoding: Encoding

    @property
    def note(self) -> Path:
        return self.path.parent / PARTS / f"{self.path.name}.json"


def write_split(
    split: Split,
    folder: Path,
    shard_size: int,
    encoding: Encoding,
    jobs: int = 1,
    *,
    max_skipped: float = DEFAULT_SHARE,
    recipe: dict[str, str] | None = None,
) -> Manifest:
    """Write `split` into `folder` as shards of `shard_size` samples; returns the manifest.

    `recipe` goes into it. DataError when more than the share `max_skipped` cannot be used.
    """
    mixed = np.random.default_rng(0).permutation(len(split.references))
    references = [split.references[number] for number in mixed]
    chunks = [references[at : at + shard_size] for at in range(0, len(references), shard_size)]
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    _refuse_strangers(folder, {f"{number:06d}.tar" for number in range(len(chunks))})
    (folder / MANIFEST_NAME).unlink(missing_ok=True)  # it would vouch for shards we replace
    _forget_other_plans(folder / PARTS, chunks, encoding, recipe)
    skipped = Skipped(folder, len(references), max_skipped)
    work = [
        _Job(folder / f"{number:06d}.tar", chunk, encoding) for number, chunk in enumerate(chunks)
    ]
    notes = []
    with closing(each(_write_shard, work, jobs)) as performed:
        bar = tqdm(performed, total=len(work), unit="shard", desc=str(folder), disable=None)
        for note in bar:
            skipped.add(note["skipped"])
            if note["entry"]["samples"]:
                notes.append(note)
    skipped.save()
    if not notes:
        raise DataError(f"{folder}: not one usable image; {skipped.path} says what is wrong")
    manifest = combine(notes, split.label_names).model_copy(update={"recipe": recipe})
    write_manifest(folder, manifest)
    shutil.rmtree(folder / PARTS)
    return manifest


def _refuse_strangers(folder: Path, ours: set[str]) -> None:
    """DataError when the folder holds other shards; half-written files of ours are removed."""
    for path in folder.glob(".*.tar.*"):
        path.unlink()
    if strangers := sorted({path.name for path in folder.glob("*.tar")} - ours):
        raise DataError(
            f"{folder} holds shards that this command would not write ({strangers[0]} and "
            f"{len(strangers) - 1} more); give an empty folder as --out, or remove them"
        )


def _forget_other_plans(
    parts: Path, chunks: list[list[Reference]], encoding: Encoding, recipe: dict[str, str] | None
) -> None:
    """Drop the notes of a run with other samples, shard size or encoding: they do not fit ours.

    The same names in another folder are other samples.
    """
    digest = hashlib.sha256(repr((encoding, sorted((recipe or {}).items()))).encode())
    for chunk in chunks:
        samples = [(one.key, one.label, whereabouts(one)) for one in chunk]
        digest.update(repr(samples).encode())
    plan = parts / "plan"
    if not plan.exists() or plan.read_text() != digest.hexdigest():
        shutil.rmtree(parts)
        parts.mkdir()
        write_atomically(plan, digest.hexdigest().encode())


def _write_shard(job: _Job) -> dict[str, Any]:
    """Write one shard and its note, unless an earlier run has; returns the note."""
    if job.note.exists():
        note = json.loads(job.note.read_text())
        if _stands(job.path, note["entry"]) and not _mended(job, note["skipped"]):
            return note
    statistics, skipped = ShardStatistics(), []
    temporary = job.path.with_name(f".{job.path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for reference in job.references:
                try:
                    image = _read(reference, job.encoding)
                    statistics.add(open_image(image.payload, MAX_PIXELS), reference.label)
                except BadSample as error:
                    skipped.append({"key": reference.key, "reason": str(error)})
                    continue
                _add(tar, f"{reference.key}.{image.extension}", image.payload)
                _add(tar, f"{reference.key}.cls", str(reference.label).encode())
        file.flush()
        os.fsync(file.fileno())
    note = _publish(job, temporary, statistics) | {"skipped": skipped}
    write_atomically(job.note, json.dumps(note).encode())
    return note


def _read(reference: Reference, encoding: Encoding) -> Encoded:
    """The image as it goes into the shard. BadSample when it cannot be used."""
    try:
        return encoding.apply(reference.read())
    except BadSample:
        raise
    except Exception as error:  # whatever a disk or somebody's dataset raises costs this sample
        first = str(error).partition("\n")[0]
        raise BadSample(f"cannot be read ({type(error).__name__}: {first})") from error


def _stands(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a shard is still what its note says; one without a sample was dropped."""
    if not entry["samples"]:
        return True
    return _is(path, entry) and _is(_index_of(path), entry["index"])


def _mended(job: _Job, skipped: list[dict[str, Any]]) -> bool:
    """Whether a sample that an earlier run skipped can be used by now."""
    keys = {line["key"] for line in skipped}
    for reference in job.references:
        if reference.key in keys:
            try:
                _read(reference, job.encoding)
            except BadSample:
                continue
            return True
    return False


def _is(path: Path, entry: dict[str, Any]) -> bool:
    return path.exists() and sha256_of(path) == entry["sha256"]


def _index_of(shard: Path) -> Path:
    return shard.with_name(shard.name + SUFFIX)


def _publish(job: _Job, temporary: Path, statistics: ShardStatistics) -> dict[str, Any]:
    """Give the shard its name, an index and a description; without a sample it is dropped."""
    index = content_for(temporary)
    samples = len(unpack(index))  # as found in the file, not as counted on the way there
    if not samples:
        temporary.unlink()
        return {"entry": {"samples": 0}}
    write_atomically(_index_of(job.path), index)
    entry = ShardEntry(
        name=job.path.name,
        samples=samples,
        bytes=temporary.stat().st_size,
        sha256=sha256_of(temporary),
        index=entry_for(index),
    )
    publish(temporary, job.path)
    return statistics.note(entry)


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    """Append a member; a fresh TarInfo has time 0 and owner 0."""
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))
