"""Reads a shard from end to end, once: its hash, a CRC of each sample, and what its images are.

Runs in the processes of `data.check --jobs`, one shard at a time. What comes back is small: keys
are hashed to 8 bytes, and the index file of a shard that is adopted is written here, under a name
that `data.check` changes when all shards have been found whole.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.decode import MAX_IMAGE_BYTES, MAX_PIXELS, open_image
from data.errors import BadSample, DataError, legible
from data.index_file import SUFFIX, entry_for, pack
from data.lazy_image import FACTORS, LazyImage
from data.manifest import MAX_CLASSES, ShardEntry, write_atomically
from data.statistics import ShardStatistics
from data.tar_index import TarIndex, index_of
from data.tar_members import BLOCK

CHUNK = 1 << 20  # bytes that are hashed at a time


class Task(NamedTuple):
    """What is asked about a shard."""

    path: Path
    labels: str  # where they are, see data.tar_index
    full_decode: bool = True
    adopt: bool = False  # write its index, under the name `draft_of`


@dataclass
class ShardReport:
    """What was found in one shard. `note` is None when its structure is damaged."""

    path: Path
    labels: str
    note: dict[str, Any] | None = None
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # hashed
    damage: list[str] = field(default_factory=list)  # of the shard
    bad: list[str] = field(default_factory=list)  # samples
    skipped: list[dict[str, str]] = field(default_factory=list)  # samples that are left out
    ignored: int = 0  # members, and the images among them by extension
    images: Counter[str] = field(default_factory=Counter)


def index_beside(shard: Path) -> Path:
    """The index file of a shard."""
    return shard.with_name(shard.name + SUFFIX)


def draft_of(shard: Path) -> Path:
    """The index file of a shard that is not adopted yet."""
    return shard.with_name(f".{shard.name}{SUFFIX}.draft")


def key_hashes(index: TarIndex) -> np.ndarray:
    """uint64 [samples]: the keys of fourteen million samples are gigabytes, these are not."""
    digests = [
        hashlib.blake2b(key.encode(), digest_size=8).digest()
        for key in (index.key(sample) for sample in range(len(index)))
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def examine(task: Task) -> ShardReport:
    """Read a shard from end to end. Never raises for what is in it; OSError of the index file."""
    report, content = ShardReport(task.path, task.labels), b""
    try:
        content = _examine(report, task)
    except FileNotFoundError:
        report.damage.append(f"{task.path}: missing")
    except DataError as error:
        report.damage.append(str(error).partition("; replace the shard")[0])
    except OSError as error:
        report.damage.append(f"{task.path}: cannot be read ({error.strerror})")
    if task.adopt and content:
        write_atomically(draft_of(task.path), content)
    return report


def _examine(report: ShardReport, task: Task) -> bytes:
    """Fills the report; returns the content of the index file."""
    path = task.path
    with open(path, "rb", buffering=0) as file:
        index = index_of(file.fileno(), str(path), labels=task.labels)
        report.keys = key_hashes(index)
        report.ignored, report.images = index.ignored, index.images
        report.skipped = [
            {"key": key, "reason": reason, "shard": path.name}
            for key, reason in index.left_out.items()
        ]
        if not len(index):
            report.damage.append(f"{path}: no sample in it")
            return b""
        statistics, digest, checks = ShardStatistics(), hashlib.sha256(), []
        for sample, (crc, payload) in enumerate(_samples(file.fileno(), index, digest)):
            checks.append(crc)
            try:
                _examine_sample(payload, index, sample, statistics, task.full_decode)
            except BadSample as error:
                report.bad.append(f"{path}: {legible(index.key(sample))}: {error}")
        size = os.fstat(file.fileno()).st_size
    content = pack(replace(index, checks=np.array(checks, dtype=np.int64)))
    report.note = statistics.note(
        ShardEntry(
            name=path.name,
            samples=len(index),
            bytes=size,
            sha256=digest.hexdigest(),
            index=entry_for(content),
        )
    )
    return content


def _samples(descriptor: int, index: TarIndex, digest: Any) -> Iterator[tuple[int, bytes]]:
    """(CRC-32 of header block and image, as in data.index_file, the image) of each sample in turn.

    Every byte of the file goes into `digest`. Of an image larger than is read only the CRC comes.
    """
    at = 0
    for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True):
        begin, end = (offset - BLOCK, offset + size) if offset else (at, at)
        for chunk in _chunks(descriptor, at, begin):
            digest.update(chunk)
        crc, kept = 0, []
        for chunk in _chunks(descriptor, begin, end):
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            if size <= MAX_IMAGE_BYTES:
                kept.append(chunk)
        yield crc, b"".join(kept)[BLOCK:]
        at = end
    for chunk in _chunks(descriptor, at, os.fstat(descriptor).st_size):
        digest.update(chunk)


def _chunks(descriptor: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end and (chunk := os.pread(descriptor, min(CHUNK, end - begin), begin)):
        yield chunk
        begin += len(chunk)


def _examine_sample(
    payload: bytes, index: TarIndex, sample: int, statistics: ShardStatistics, full_decode: bool
) -> None:
    if sample in index.faults:
        raise BadSample(index.faults[sample])
    label, size = int(index.labels[sample]), int(index.sizes[sample])
    if label >= MAX_CLASSES:
        raise BadSample(f"label {label}; classes are numbered from 0 to {MAX_CLASSES - 1}")
    if size > MAX_IMAGE_BYTES:
        raise BadSample(f"an image of {size} encoded bytes; {MAX_IMAGE_BYTES} are allowed")
    image = open_image(payload, MAX_PIXELS)
    if full_decode:
        LazyImage(payload, 3, MAX_PIXELS).pixels(FACTORS[0])  # as data.encoding: every coded byte
    statistics.add(image, label)
