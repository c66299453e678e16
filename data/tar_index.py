"""Where every sample of a shard lies, read from the tar headers and nothing taken on trust.

Python's tarfile ends quietly at a cut between members, at a flipped header bit and at a zeroed
block, so a damaged shard is a shorter shard and nobody notices. Here every header's checksum, every
member's extent and the end-of-archive blocks are checked; any fault is a DataError that names shard
and offset. Members are then read by position: no name from a tar ever becomes a path.

Grouping is WebDataset's: the key is the name up to the first dot of its last component, the rest is
the extension; members of a sample are neighbours. A sample is one image plus one `.cls` (the label
as text). Cost: one pread of 1 KiB per member.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from data.errors import BadShard

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp"})
# Formats that run code or inflate without bound when other tools open them. Never read here; the
# sample that carries one is set aside, because nobody puts these beside an image by accident.
FORBIDDEN_EXTENSIONS = frozenset(
    "pyd pkl pickle dill joblib pt pth ckpt gz bz2 xz zst zip".split()  # noqa: SIM905
)
NO_LABEL = -1
MAX_LABEL_BYTES = 20
MAX_NAME_BYTES = 4096  # of a long-name or pax record; a larger one is an attack on memory


class Member(NamedTuple):
    """One regular file in the tar: payload at `offset`, its first 512 bytes in `head`."""

    name: str
    header: int
    offset: int
    size: int
    head: bytes


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, in file order. Arrays have one row per sample."""

    keys: np.ndarray  # bytes, UTF-8
    offsets: np.ndarray  # int64: where the image starts
    sizes: np.ndarray  # int64: bytes of the image
    labels: np.ndarray  # int64: the class, NO_LABEL where it is no number
    faults: dict[int, str] = field(default_factory=dict)  # sample -> why it cannot be used
    checks: np.ndarray | None = None  # int64: CRC-32 of each sample, see data.index_file
    ignored: int = 0  # members that are neither image nor label

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """The key of a sample, as text."""
        return bytes(self.keys[sample]).decode()


class _Tar:
    """A tar file open for strict reading."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def fault(self, offset: int, what: str) -> NoReturn:
        raise BadShard(
            f"{self.name}: offset {offset}: {what}; replace the shard by a good copy or write it "
            f"again (`python -m data.check '{self.name}'` reports on it)"
        )

    def members(self) -> Iterator[Member]:
        """Every regular file in order; faults at the first thing that is not as it should be."""
        if self.size % BLOCK:
            self.fault(self.size, f"the file is no multiple of {BLOCK} bytes long: it is cut")
        position = 0
        long_name: str | None = None
        while True:
            block = os.pread(self.descriptor, 2 * BLOCK, position)
            header, head = block[:BLOCK], block[BLOCK:]
            if len(header) < BLOCK:
                self.fault(position, "the end-of-archive blocks are missing: the file is cut")
            if header == ZERO_BLOCK:
                self._check_end(position)
                return
            self._check_sum(header, position)
            size, kind = self._number(header[124:136], position), header[156:157]
            offset = position + BLOCK
            following = offset + -(-size // BLOCK) * BLOCK
            if following > self.size:
                self.fault(
                    position, f"a member claims {size} bytes and the file has {self.size - offset}"
                )
            if kind in (b"x", b"L"):
                long_name = self._long_name(kind, offset, size, position)
            elif kind in (b"0", b"\0"):
                name = _plain_name(long_name or self._short_name(header, position))
                if name is None:
                    self.fault(position, f"the member name {long_name or header[:100]!r} is unsafe")
                yield Member(name, position, offset, size, head[:size])
                long_name = None
            elif kind == b"5":
                long_name = None
            elif kind != b"g":
                self.fault(position, f"a member of type {kind!r} (link, device, sparse) is refused")
            position = following

    def _check_sum(self, header: bytes, position: int) -> None:
        computed = sum(header) - sum(header[148:156]) + 8 * ord(" ")
        if self._number(header[148:156], position) != computed:
            self.fault(position, "the header's checksum does not match: damaged, or no plain tar")

    def _number(self, digits: bytes, position: int) -> int:
        if digits[:1] == b"\x80":  # GNU's binary form, for sizes past 8 GiB
            return int.from_bytes(digits[1:], "big")
        text = digits.strip(b"\0 ")
        if not text.isdigit() or b"8" in text or b"9" in text:
            self.fault(position, f"{digits!r} in a header is no octal number: damaged, or no tar")
        return int(text, 8)

    def _check_end(self, position: int) -> None:
        if position + 2 * BLOCK > self.size:
            self.fault(position, "one of the two end-of-archive blocks is missing: the file is cut")
        while chunk := os.pread(self.descriptor, 1 << 20, position):
            if chunk.count(0) != len(chunk):
                self.fault(
                    position, "zeroed blocks with data behind them: part of the file is lost"
                )
            position += len(chunk)

    def _short_name(self, header: bytes, position: int) -> str:
        name = header[:100].split(b"\0")[0]
        prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
        try:
            return (prefix + b"/" + name if prefix else name).decode()
        except UnicodeDecodeError:
            self.fault(position, f"the member name {name!r} is not UTF-8")

    def _long_name(self, kind: bytes, offset: int, size: int, position: int) -> str | None:
        """The name in a GNU long-name member or a pax header; None where pax gives no path."""
        if size > MAX_NAME_BYTES:
            self.fault(position, f"a name record of {size} bytes is refused")
        payload = os.pread(self.descriptor, size, offset)
        try:
            if kind == b"L":
                return payload.split(b"\0")[0].decode()
            records = _pax_records(payload)
        except ValueError:
            self.fault(position, "a name record cannot be read")
        if records.keys() & {"size", "linkpath"} or any("sparse" in name for name in records):
            self.fault(position, "a pax header that changes size or target is refused")
        return records.get("path")


def _pax_records(payload: bytes) -> dict[str, str]:
    """The `length key=value` records of a pax header. ValueError when malformed."""
    records = {}
    while payload:
        length = int(payload[: payload.index(b" ")])
        record, payload = payload[:length], payload[length:]
        if not record.endswith(b"\n"):
            raise ValueError(record)
        name, value = record.split(b" ", 1)[1][:-1].decode().split("=", 1)
        records[name] = value
    return records


def _plain_name(name: str) -> str | None:
    """The name without a leading './'; None when it could lead out of a folder or hide in a log."""
    name = name.removeprefix("./")
    if not name or name.startswith("/") or "\\" in name or not name.isprintable():
        return None
    return None if any(part in ("", ".", "..") for part in name.split("/")) else name


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member name by WebDataset's rule; the extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


@dataclass
class _Draft:
    """A sample while its members are being met."""

    key: str
    header: int
    image: Member | None = None
    label: int | None = None
    fault: str | None = None


class _Builder:
    """Groups members into samples; refuses what does not pair up."""

    def __init__(self, tar: _Tar) -> None:
        self.tar = tar
        self.samples: list[_Draft] = []
        self.seen: set[str] = set()
        self.ignored = 0

    def add(self, member: Member) -> None:
        key, extension = split_name(member.name)
        if not self.samples or self.samples[-1].key != key:
            self.close()
            if key in self.seen:
                self.tar.fault(member.header, f"key {key!r} comes a second time or is interleaved")
            self.seen.add(key)
            self.samples.append(_Draft(key, member.header))
        sample = self.samples[-1]
        if extension in IMAGE_EXTENSIONS:
            if sample.image is not None:
                self.tar.fault(member.header, f"key {key!r} has two images")
            sample.image = member
        elif extension == "cls":
            if sample.label is not None:
                self.tar.fault(member.header, f"key {key!r} has two labels")
            sample.label = _label(member)
            if sample.label == NO_LABEL:
                sample.fault = f"the label {member.head[:MAX_LABEL_BYTES]!r} is no class number"
        elif extension.rpartition(".")[2] in FORBIDDEN_EXTENSIONS:
            sample.fault = f"a member of the forbidden type .{extension}"
        else:
            self.ignored += 1

    def close(self) -> None:
        """Check that the sample met last is whole."""
        if not self.samples:
            return
        sample = self.samples[-1]
        if sample.fault is None and (sample.image is None or sample.label is None):
            missing = "image" if sample.image is None else "label (.cls)"
            self.tar.fault(sample.header, f"key {sample.key!r} has no {missing}")


def _label(member: Member) -> int:
    text = member.head.strip()
    if member.size > MAX_LABEL_BYTES or not re.fullmatch(rb"[0-9]{1,9}", text):
        return NO_LABEL
    return int(text)


def read_index(path: Path, expected_samples: int | None = None) -> TarIndex:
    """Index the shard at `path`; see `index_of`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return index_of(descriptor, str(path), expected_samples)
    finally:
        os.close(descriptor)


def index_of(descriptor: int, name: str, expected_samples: int | None = None) -> TarIndex:
    """Index an open shard, which errors call `name`.

    Raises BadShard, naming shard and offset, for anything that is not a whole plain tar of
    image + label pairs, or that does not hold `expected_samples` of them.
    """
    tar = _Tar(name, descriptor)
    builder = _Builder(tar)
    for member in tar.members():
        builder.add(member)
    builder.close()
    samples = builder.samples
    if expected_samples is not None and len(samples) != expected_samples:
        tar.fault(
            tar.size, f"{len(samples)} samples found and the manifest says {expected_samples}"
        )
    return TarIndex(
        keys=np.array([sample.key.encode() for sample in samples], dtype=np.bytes_),
        offsets=np.array([s.image.offset if s.image else 0 for s in samples], dtype=np.int64),
        sizes=np.array([s.image.size if s.image else 0 for s in samples], dtype=np.int64),
        labels=np.array(
            [NO_LABEL if s.label is None else s.label for s in samples], dtype=np.int64
        ),
        faults={number: s.fault for number, s in enumerate(samples) if s.fault is not None},
        ignored=builder.ignored,
    )
