"""The members of a tar file, read from its headers with nothing taken on trust.

Python's tarfile ends quietly at a cut between members, at a flipped header bit and at a zeroed
block, so a damaged shard is a shorter shard and nobody notices. Here every header's checksum, every
member's extent and the end-of-archive blocks are checked; any fault is a DataError that names shard
and offset. Members are then read by position: no name from a tar ever becomes a path.

Cost: one pread of 1 KiB per member.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from data.errors import BadShard

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
MAX_NAME_BYTES = 4096  # a longer name is an attack on memory
MAX_RECORD_BYTES = 1 << 20  # of a pax header: beside the name it may hold a file's attributes
_REFUSED = ("Cc", "Zl", "Zp")  # kinds of characters: controls, ends of lines and paragraphs


class Member(NamedTuple):
    """One regular file in the tar: payload at `offset`, its first 512 bytes in `head`."""

    name: str
    header: int
    offset: int
    size: int
    head: bytes


class Tar:
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
        if any(os.pread(self.descriptor, 6, 0).startswith(magic) for magic in COMPRESSED):
            self.fault(0, "it is compressed, and samples are read from their places: unpack it")
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
                given = long_name or self._short_name(header, position)
                if (name := _plain_name(given)) is None:
                    self.fault(position, f"the member name {given!r} is unsafe")
                yield Member(name, position, offset, size, head[:size])
                long_name = None
            elif kind == b"5":
                long_name = None
            elif kind != b"g":
                what = f"a member of type {kind!r} (link, device, sparse) is refused"
                if kind in (b"1", b"2"):
                    what += "; `tar --dereference --hard-dereference` stores files, not links"
                self.fault(position, what)
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
        if size > (MAX_NAME_BYTES if kind == b"L" else MAX_RECORD_BYTES):
            self.fault(position, f"a name record of {size} bytes is refused")
        payload = os.pread(self.descriptor, size, offset)
        try:
            if kind == b"L":
                return payload.split(b"\0")[0].decode()
            records = _pax_records(payload)
            path = records["path"].decode() if "path" in records else None
        except ValueError:
            self.fault(position, "a name record cannot be read")
        if records.keys() & {"size", "linkpath"} or any("sparse" in name for name in records):
            self.fault(position, "a pax header that changes size or target is refused")
        if path is not None and len(records["path"]) > MAX_NAME_BYTES:
            self.fault(position, f"a name of {len(records['path'])} bytes is refused")
        return path


def _pax_records(payload: bytes) -> dict[str, bytes]:
    """The `length key=value` records of a pax header. ValueError when malformed.

    Values stay bytes: those of extended attributes need not be text.
    """
    records, at = {}, 0
    while at < len(payload):
        blank = payload.index(b" ", at)
        end = at + int(payload[at:blank])
        if not blank < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise ValueError(payload[at:end])
        name, separator, value = payload[blank + 1 : end - 1].partition(b"=")
        if not separator:
            raise ValueError(name)
        records[name.decode()] = value
        at = end
    return records


def _plain_name(name: str) -> str | None:
    """The name without a leading './'; None when it could lead out of a folder or steer a terminal.

    What merely cannot be seen is in honest names: soft hyphens, marks of direction, new emoji.
    """
    name = name.removeprefix("./")
    if not name or name.startswith("/") or "\\" in name:
        return None
    if not name.isprintable() and any(unicodedata.category(c) in _REFUSED for c in name):
        return None
    return None if any(part in ("", ".", "..") for part in name.split("/")) else name
