"""Room in the cache: who fetches reserves it, what was longest unused makes it.

Room is given by one process at a time. Whoever fetches keeps the .part file locked, and its name
says how long it will become: that is the reservation, and it ends with the process that made it.

A look at all files takes some 15 us each, for which every process of the node would wait. So the
lock file holds a count that is never below the bytes in use, and each reservation adds to it; the
files are looked at only when it reaches the limit, and then a twentieth more than needed goes.
Files that somebody else put there are counted by each process's first reservation.
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from data.locks import is_locked, locked

SPARE = 20  # one part in so many is made free at a time


class Room:
    """The bytes that the files of `folder` may take, `limit` at most."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._counted = False

    def lock(self) -> AbstractContextManager[io.FileIO]:
        """Held while files get or lose their names."""
        return locked(self.folder / "lock-room")

    def claimed(self, part: Path, needed: int) -> io.FileIO | None:
        """The locked `part`, once it has room; None while others' fetches take it."""
        with self.lock() as count:
            used = _read(count) if self._counted else None
            if used is None or used + needed > self.limit:
                used = self._make_room(part, needed)
                if used is None:
                    return None
                self._counted = True
            _write(count, used + needed)
            file = io.FileIO(part, "a+")
            fcntl.flock(file, fcntl.LOCK_EX)
            return file

    def _make_room(self, part: Path, needed: int) -> int | None:
        """Remove what was longest unused until `needed` bytes fit.

        Returns the bytes that are in use then, without `part`; None while they cannot fit.
        """
        reserved, kept = 0, []
        for entry in self._entries():
            path = Path(entry.path)
            if path == part:
                continue
            if path.suffix == ".part" and is_locked(path):
                reserved += int(path.suffixes[0][1:])
            else:
                status = entry.stat()
                kept.append((status.st_mtime_ns, status.st_size, path))
        if reserved + needed > self.limit:
            return None
        used = reserved + sum(size for _, size, _ in kept)
        # the spare room only where some must be made: a set that fits is never evicted
        target = self.limit - (self.limit // SPARE if used + needed > self.limit else 0)
        for _, size, path in sorted(kept):
            if used + needed <= target:
                break
            path.unlink()
            used -= size
        return used

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            yield from (entry for entry in entries if entry.name.endswith((".tar", ".part")))


def _read(count: io.FileIO) -> int | None:
    """The bytes in use, at most; None where nobody counted them or the count was cut."""
    text = os.pread(count.fileno(), 32, 0)
    return int(text) if len(text) == 21 and text.strip().isdigit() else None


def _write(count: io.FileIO, used: int) -> None:
    count.truncate(0)
    os.write(count.fileno(), b"%020d\n" % used)
