"""The index of a shard, kept in a file beside it, so that nobody has to walk the tar again.

Walking costs a read and some 13 us per member, and the first batch after a resume in the middle of
an epoch touches many more shards than the first of an epoch. NAME.tar.index holds what the walk
found plus a CRC-32 per sample; the manifest holds its size and SHA-256, so it is trusted exactly as
far as the manifest is. A shard whose index is missing or damaged is walked instead.

With an index, damage is local: every image is compared with its CRC as it is read (its tar header
too), so a flipped bit costs one sample, whatever the bit, and is found however late it flips.

Layout: MAGIC, the number of samples n as int64, an int64 array [4, n] of offsets, sizes, labels and
checks (all little-endian), and a JSON object with the keys, faults and ignored members.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.manifest import IndexEntry
from data.tar_index import TarIndex, index_of
from data.tar_members import BLOCK

MAGIC = b"routedvit-idx-1\n"
SUFFIX = ".index"
_COLUMNS = ("offsets", "sizes", "labels", "checks")
_START = len(MAGIC) + 8
CHUNK = 1 << 24  # bytes that are in memory while a sample is hashed


def content_for(shard: Path) -> bytes:
    """What belongs into the index file of a shard. BadShard when the shard is damaged."""
    with open(shard, "rb", buffering=0) as file:
        return pack(with_checks(index_of(file.fileno(), str(shard)), file.fileno()))


def entry_for(content: bytes) -> IndexEntry:
    """How the manifest vouches for an index file."""
    return IndexEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def with_checks(index: TarIndex, descriptor: int) -> TarIndex:
    """The index plus a CRC-32 per sample, of its image and the header block before it."""
    checks = [
        _crc(descriptor, offset - BLOCK, size + BLOCK) if offset else 0
        for offset, size in zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    ]
    return replace(index, checks=np.array(checks, dtype=np.int64))


def _crc(descriptor: int, offset: int, size: int) -> int:
    """CRC-32 of a stretch of a file; in parts, as a hostile shard may hold an image of any size."""
    crc, end = 0, offset + size
    while chunk := os.pread(descriptor, min(CHUNK, end - offset), offset):
        crc, offset = zlib.crc32(chunk, crc), offset + len(chunk)
    return crc


def pack(index: TarIndex) -> bytes:
    """The content of the index file; equal indices make equal bytes."""
    columns = np.stack([getattr(index, name) for name in _COLUMNS]).astype("<i8")
    words = {
        "keys": [index.key(sample) for sample in range(len(index))],
        "faults": {str(sample): reason for sample, reason in sorted(index.faults.items())},
        "ignored": index.ignored,
    }
    count = len(index).to_bytes(8, "little")
    return MAGIC + count + columns.tobytes() + json.dumps(words).encode()


def unpack(content: bytes) -> TarIndex:
    """The index that `pack` made `content` of; only for content whose hash has been compared."""
    count = int.from_bytes(content[len(MAGIC) : _START], "little")
    # a copy: a view would keep all of `content` alive, thrice what the columns need
    columns = np.frombuffer(content, "<i8", 4 * count, _START).reshape(4, count).copy()
    words = json.loads(content[_START + columns.nbytes :])
    offsets, sizes, labels, checks = columns
    return TarIndex(
        keys=np.array([key.encode() for key in words["keys"]], dtype=np.bytes_),
        faults={int(sample): reason for sample, reason in words["faults"].items()},
        ignored=words["ignored"],
        offsets=offsets,
        sizes=sizes,
        labels=labels,
        checks=checks,
    )
